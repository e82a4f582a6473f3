"""Two arguments of a stock TRL trainer: what comes out is orthonormal, resumes exactly, and the base is the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import qriemann
from qriemann import InputError
from qriemann.training.seam import fixed_rank_optimizer
from tests.models import (
    WORDS,
    assert_unchanged,
    counting_rows,
    load_nf4,
    save_tiny_base,
    snapshot,
    tiny_llama,
    trainer_settings,
    variants,
    with_lora,
    word_tokenizer,
)
from tests.runs import assert_same, outcome, sft_trainer

starts = pytest.mark.parametrize("start", ["zero", "offset"])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def assert_on_the_manifold(trainer: Any) -> None:
    found = variants(trainer.model)
    assert len(found) == 14
    assert {p.dtype for p in factors(trainer.model).values()} == {torch.float32}
    for name, (_, point) in found.items():
        for basis in (point.u.detach(), point.v_transposed.detach().mT):
            error = basis.double().mT @ basis.double() - torch.eye(basis.shape[1], dtype=torch.float64)
            assert error.abs().max() < 1e-5, name  # the bound of the contract


# SFT on a 4-bit model.


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("zero", {}),
        ("offset", {}),
        ("offset", {"lora": {"use_rslora": True, "lora_dropout": 0.1, "rank_pattern": {"q_proj": 7}}}),
        ("zero", {"gradient_accumulation_steps": 2, "activation_checkpointing": False}),
        ("offset", {"activation_checkpointing_kwargs": {"use_reentrant": False}}),
        ("zero", {"method": {"nesterov": True, "weight_decay": 0.1, "tangent_iterations": 3}}),
    ],
    ids=["zero", "offset", "rslora, dropout, rank_pattern", "accumulation", "non-reentrant", "options"],
)
def test_sft_on_a_4_bit_model_ends_on_the_manifold_with_the_same_base(start, options, base, tmp_path):
    trainer = sft_trainer(load_nf4(base), tmp_path, start, eval_strategy="steps", eval_steps=2, **options)
    before = snapshot(trainer.model)
    assert {p.dtype for p in factors(trainer.model).values()} == {torch.bfloat16}  # TRL's cast, which comes first
    trainer.train()
    assert_on_the_manifold(trainer)
    assert fixed_rank_optimizer(trainer.optimizer).orthonormality_drift() < 1e-5
    assert_unchanged(trainer.model, before, frozen=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


# Resuming.


@starts
@pytest.mark.parametrize(
    ("nf4", "lora"),
    [(True, {"lora_dropout": 0.1}), (False, {"lora_dropout": 0.1, "modules_to_save": ["lm_head"]})],
    ids=["4-bit, dropout", "float, dropout, modules_to_save"],
)
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(start, lora, nf4, base, tmp_path):
    def trainer(folder: Path) -> SFTTrainer:
        model = load_nf4(base) if nf4 else tiny_llama()
        callbacks = [qriemann.FixedRankCallback()] if start == "offset" else []
        return sft_trainer(model, folder, start, lora=lora, callbacks=callbacks, save_strategy="steps", save_steps=2)

    whole = trainer(tmp_path / "whole")
    whole.train()
    torch.manual_seed(99)  # another process: whatever was drawn before must not matter
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(outcome(whole), outcome(resumed))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0][2:] == losses[1][-2:]


@starts
def test_one_trainer_can_go_back_to_its_own_checkpoint(start, tmp_path):
    trainer = sft_trainer(tiny_llama(), tmp_path, start, save_strategy="steps", save_steps=2)
    trainer.train()
    expected = outcome(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(outcome(trainer), expected)


# DPO.


def preferences() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{WORDS[i % 8]} ", "chosen": WORDS[i % 8 + 1], "rejected": WORDS[(i + 5) % 8]} for i in range(16)]
    )


# https://github.com/huggingface/trl: disable_gradient_checkpointing of TRL 1.16 uses names that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
@pytest.mark.parametrize(("start", "given"), [("offset", "a config"), ("zero", "an adapter")])
def test_dpo_trains_with_the_same_optimizer_on_the_manifold(start, given, base, tmp_path):
    model: nn.Module = load_nf4(base)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    adapter = {"peft_config": LoraConfig(**lora)} if given == "a config" else {}
    trainer = DPOTrainer(
        model=model if adapter else with_lora(model),
        processing_class=word_tokenizer(),
        args=DPOConfig(**trainer_settings(tmp_path, save_strategy="steps", save_steps=4, max_length=32)),
        train_dataset=preferences(),
        **adapter,
    )
    # TRL 1.16's DPOTrainer does not pass this argument on to the Trainer whose attribute it is; SFTTrainer does.
    trainer.optimizer_cls_and_kwargs = qriemann.for_trainer("riemannion", lr=0.05, start=start)
    trainer.train()
    assert_on_the_manifold(trainer)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    # At the start the model is its own reference: the loss is -log sigmoid(0), to bf16's or float32's rounding.
    assert logs[0]["loss"] == pytest.approx(math.log(2), rel=1e-2)
    assert logs[-1]["loss"] < logs[0]["loss"]
    saved = LoraConfig.from_pretrained(tmp_path / "checkpoint-4")
    assert saved.r == (8 if start == "offset" else 4)
    if given == "an adapter":
        # TRL's frozen copy, the reference, is plain LoRA of the rank it was made with.
        assert LoraConfig.from_pretrained(tmp_path / "checkpoint-4" / "ref").r == 4


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
def test_dpo_on_an_adapter_that_is_attached_already_is_refused_with_the_remedy(tmp_path):
    trainer = sft_trainer(tiny_llama(), tmp_path / "sft", "zero")
    trainer.train()
    dpo = DPOTrainer(
        model=trainer.model,
        processing_class=word_tokenizer(),
        args=DPOConfig(**trainer_settings(tmp_path / "dpo", max_length=32)),
        train_dataset=preferences(),
    )
    dpo.optimizer_cls_and_kwargs = qriemann.for_trainer("riemannion", lr=0.05)
    # TRL made its reference of U and V^T.
    with pytest.raises(InputError, match=r"'ref' copies the factors .*; save it, and train what"):
        dpo.train()


@starts
def test_a_second_trainer_on_the_same_model_leaves_the_adapter_as_it_was(start, base, tmp_path):
    # TRL casts what is trained on a 4-bit base to bf16 in its constructor.
    first = sft_trainer(load_nf4(base), tmp_path / "first", start)
    first.train()
    first.save_model(str(tmp_path / "a"))
    second = SFTTrainer(
        model=first.model,
        processing_class=word_tokenizer(),
        args=SFTConfig(**trainer_settings(tmp_path / "second")),
        train_dataset=counting_rows(),
        optimizer_cls_and_kwargs=qriemann.for_trainer("riemannion", lr=0.05),
    )
    assert any(p.dtype == torch.bfloat16 for p in first.model.parameters() if p.requires_grad)
    second.save_model(str(tmp_path / "b"))
    second.create_optimizer()
    second.save_model(str(tmp_path / "c"))
    saved = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert saved[0] == saved[1] == saved[2]
