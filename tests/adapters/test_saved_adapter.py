"""Whatever is saved, at any moment, is a plain LoRA adapter: a process without qriemann computes the same logits with it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import TrainerCallback

import qriemann
from tests.models import (
    load_nf4,
    logits,
    logits_under_plain_peft,
    relative,
    save_tiny_base,
    take_steps,
    tiny_llama,
    token_batch,
    with_lora,
)
from tests.runs import sft_trainer

# https://github.com/huggingface/peft: 0.21 takes the bias of lora_bias=True, a vector, for a B that ZeRO-3 did not gather.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape.*lora_B.bias:UserWarning")

# The contract's own bound; U S is rounded once more than in the layer.
LOGITS_RTOL = 1e-4

PATTERNS = {"rank_pattern": {"q_proj": 7, "down_proj": 2}, "alpha_pattern": {"down_proj": 3, "v_proj": 5}}
IDS = token_batch(rows=3, length=12, vocabulary=16)


@dataclass
class Saved:
    """A folder with an adapter, what the model that saved it computed then, and what plain PEFT computes with it."""

    folder: Path
    expected: Tensor
    nf4: bool
    plain: Tensor | None = None


class RecordLogits(TrainerCallback):
    """Notes what the model computes whenever a checkpoint is written."""

    def __init__(self) -> None:
        self.at_step: dict[int, Tensor] = {}

    def on_save(self, args, state, control, model=None, **kwargs) -> None:
        self.at_step[state.global_step] = logits(model, IDS)


def train_with_sft(base: Path, folder: Path, start: str) -> dict[str, Saved]:
    """Every checkpoint and the final adapter of a run of the stock trainer on the 4-bit model."""
    record = RecordLogits()
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = sft_trainer(load_nf4(base), folder, start, lora={"lora_dropout": 0.1}, callbacks=[record], **saving)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    saved = {
        f"checkpoint-{step}": Saved(folder / f"checkpoint-{step}", expected, True)
        for step, expected in record.at_step.items()
    }
    return saved | {"save_model": Saved(folder / "final", logits(trainer.model, IDS), True)}


LOOPS: dict[str, dict] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora and patterns": {"use_rslora": True, **PATTERNS},
    "rank one": {"r": 1, "lora_alpha": 2},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
    "bias all": {"bias": "all"},
}


def train_in_a_loop(folder: Path, start: str, options: dict) -> Saved:
    """An adapter that a few steps outside any trainer left, saved by PEFT's own save_pretrained."""
    model = with_lora(tiny_llama(bias=True), **options)
    optimizer = qriemann.Riemannion(model, lr=0.05, adamw_lr=0.01, start=start, seed=0)
    take_steps(model, optimizer, range(3))
    model.save_pretrained(folder)
    return Saved(folder, logits(model, IDS), False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    save_tiny_base(root / "nf4")
    tiny_llama(bias=True).save_pretrained(root / "float")
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory, bases) -> dict[tuple[str, str], Saved]:
    """Everything that is saved, loaded in one process without qriemann."""
    root = tmp_path_factory.mktemp("saved")
    everything: dict[tuple[str, str], Saved] = {}
    for start in ("zero", "offset"):
        for name, entry in train_with_sft(bases / "nf4", root / f"sft-{start}", start).items():
            everything[start, name] = entry
        for name, options in LOOPS.items():
            everything[start, name] = train_in_a_loop(root / f"{start}-{name}", start, options)
    entries = list(everything.values())
    adapters = [(bases / ("nf4" if entry.nf4 else "float"), entry.nf4, entry.folder) for entry in entries]
    for entry, plain in zip(entries, logits_under_plain_peft(adapters, IDS), strict=True):
        entry.plain = plain
    return everything


FROM_SFT = ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4", "save_model"]
starts = pytest.mark.parametrize("start", ["zero", "offset"])


@starts
@pytest.mark.parametrize("name", [*FROM_SFT, *LOOPS])
def test_plain_peft_computes_the_same_logits(start, name, saved):
    entry = saved[start, name]
    assert relative(entry.plain, entry.expected) < LOGITS_RTOL
    config, given = LoraConfig.from_pretrained(entry.folder), {"r": 4, **LOOPS.get(name, {})}
    assert config.r == given["r"] * (2 if start == "offset" else 1)


@starts
def test_training_changed_what_is_saved_from_checkpoint_to_checkpoint(start, saved):
    for earlier, later in itertools.pairwise(FROM_SFT[:4]):
        assert relative(saved[start, later].plain, saved[start, earlier].plain) > 1e-3


@starts
def test_a_saved_adapter_loaded_again_is_the_same_point_and_trains_on(start, saved, bases):
    from transformers import AutoModelForCausalLM

    entry = saved[start, "plain"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases / "float"), entry.folder, is_trainable=True
    )
    optimizer = qriemann.Riemannion(model, lr=0.05)
    assert all(point.offset is None for point in optimizer.points)  # the offset is part of the rank 2 r point now
    assert relative(logits(model, IDS), entry.expected) < LOGITS_RTOL
    losses = take_steps(model, optimizer, [4] * 8)
    assert losses[-1] < losses[0] - 0.05
    assert optimizer.orthonormality_drift() < 1e-5
