"""What training accepts, every command reads: the table of kinds x the commands, against PEFT in plain floats."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from qriemann.adapters.saved import read_adapter
from qriemann.adapters.saved_config import COMMANDS, KINDS
from qriemann.chat.session import load_session
from qriemann.errors import InputError
from qriemann.evaluation.evaluate import evaluate
from qriemann.evaluation.trained import load_trained
from qriemann.release.export import export
from qriemann.release.inspect import inspect
from qriemann.release.merge import merge
from qriemann.upstream import quiet
from tests.models import edit_json, logits, relative, with_lora
from tests.recipe_fixtures import make_tokenizer
from tests.release.conftest import save_chat_base, write_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:fan_in_fan_out is set to",
    "ignore:Setting `save_embedding",
    # PEFT 0.21 takes the bias of a LoRA layer for a broken factor.
    "ignore:Adapter 'default'. .* invalid shape",
)
# Float32 sums of the same products in another order.
RTOL = 1e-5
IDS = torch.arange(3, 43)[None]


class Case(NamedTuple):
    """An adapter of a kind: how its base is made, its LoraConfig, and how many tokens were added."""

    base: dict[str, Any]
    options: dict[str, Any]
    grown: int = 0


TIED: dict[str, Any] = {"tie_word_embeddings": True}
Q = {"target_modules": ["q_proj", "down_proj"]}
CASES = {
    "rslora": Case({}, {"use_rslora": True}),
    "patterns": Case(
        {},
        {
            "rank_pattern": {r"model\.layers\.[1-9]\.(self_attn|mlp)\..*": 7, "up_proj": 2},
            "alpha_pattern": {r"^model.layers.0.mlp.(gate|down)_proj": 3},
        },
    ),
    "some layers": Case({}, {**Q, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "a pattern of targets": Case(
        {}, {"target_modules": r".*layers\.\d+\.self_attn\.(q|v)_proj", "exclude_modules": r".*1.*v_proj"}
    ),
    "biases": Case({"attention_bias": True}, {"bias": "all", "target_modules": ["q_proj"]}),
    "lora_bias": Case({"attention_bias": True}, {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
    "a head": Case({}, {**Q, "modules_to_save": ["lm_head"]}),
    "head and embeddings": Case({}, {**Q, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "a tied head": Case(TIED, {**Q, "modules_to_save": ["lm_head"]}),
    "tied embeddings": Case(TIED, {**Q, "modules_to_save": ["embed_tokens"]}),
    "both of a tied pair": Case(TIED, {**Q, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "a pair kept tied": Case(TIED, {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "LoRA on a head": Case({}, {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on a tied head": Case(TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "tokens": Case({}, {**Q, "trainable_token_indices": [9, 3, 70]}),
    "tokens of a tied pair": Case(TIED, {**Q, "trainable_token_indices": [9, 3, 70]}),
    "tokens by name": Case({}, {**Q, "trainable_token_indices": {"embed_tokens": [5, 4]}}),
    "a grown vocabulary": Case({}, Q, 2),
    "a grown tied vocabulary": Case(TIED, Q, 3),
    "a grown vocabulary trained whole": Case({}, {**Q, "modules_to_save": ["lm_head", "embed_tokens"]}, 2),
    "tokens of a grown vocabulary": Case({}, {**Q, "trainable_token_indices": [9, 261]}, 2),
    "LoRA on the head of a grown vocabulary": Case(TIED, {"target_modules": ["q_proj", "lm_head"]}, 2),
    "a Conv1D base": Case({"gpt2": True}, {}),
    "a Conv1D base with a head": Case({"gpt2": True}, {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}),
}


def save_gpt2(folder: Path) -> Path:
    """A GPT-2 of two layers, whose linear layers are Conv1D and whose head is tied."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, **ends, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Made(NamedTuple):
    base: Path
    adapter: Path
    expected: Tensor


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def made(request, tmp_path_factory) -> Made:
    """The adapter as PEFT saves it, with random content of rank 3 everywhere, and the logits that PEFT computes."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp("kind")
    gpt2 = case.base.get("gpt2")
    base = save_gpt2(folder / "base") if gpt2 else save_chat_base(folder / "base", shard="10MB", **case.base)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), make_tokenizer()
    if case.grown:
        tokenizer.add_tokens([f"<{n}>" for n in range(case.grown)])
        model.resize_token_embeddings(len(tokenizer))
    model = with_lora(model, **case.options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.2 if "trainable_tokens" in name or "modules_to_save" in name else 0.05
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
            if "lora_B" in name and parameter.ndim == 2:
                parameter.data[:, 3:] = 0
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return Made(base, folder / "adapter", logits(model, IDS))


def test_chat_and_eval_compute_what_peft_does(made):
    session = load_session(made.adapter, quantize="none", device="cpu")
    assert relative(logits(session.model, IDS), made.expected) < RTOL
    trained = load_trained(read_adapter(made.adapter, "eval"), None, None, Console(quiet=True), quantize="none")
    assert relative(logits(trained.peft, IDS), made.expected) < RTOL
    with quiet(), trained.untrained() as base:
        plain = AutoModelForCausalLM.from_pretrained(made.base).eval()
        assert relative(logits(base, IDS)[..., : plain.config.vocab_size], logits(plain, IDS)) < RTOL


def test_inspect_shows_the_change_of_every_layer(made, tmp_path):
    found = {one.name: one for one in inspect(made.adapter, plot=tmp_path / "x.png")}
    trained = load_trained(read_adapter(made.adapter), None, None, Console(quiet=True), quantize="none")
    assert found.keys() == trained.lora_layers.keys()
    for name, layer in trained.lora_layers.items():
        assert found[name].norm == pytest.approx(layer.get_delta_weight("default").norm().item(), rel=1e-4)
        # A tied head has no tensor of its own.
        assert found[name].relative_norm is not None or name == "lm_head"


def test_export_keeps_everything_but_the_rank(made, tmp_path):
    # No layer uses its fourth direction.
    assert export(made.adapter, tmp_path / "out", rank=3, quantize="none").accepted
    session = load_session(tmp_path / "out", quantize="none", device="cpu")
    assert relative(logits(session.model, IDS), made.expected) < RTOL


@pytest.mark.slow  # a fresh process for each
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_merge_into_every_base_passes_its_proof_and_computes_what_peft_does(made, tmp_path, quantize):
    own = "original" if quantize == "none" else "nf4-dequantized"
    result = merge(made.adapter, tmp_path / "out", into=[own, "nf4", "original"], quantize=quantize)  # type: ignore[list-item]
    assert result.accepted, result.report["conclusions"]
    expected = made.expected
    if quantize == "nf4":
        trained = load_trained(read_adapter(made.adapter), None, None, Console(quiet=True), quantize=quantize)
        expected = logits(trained.peft, IDS)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(result.folder / own), IDS), expected) < RTOL


# The table itself.

READS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "inspect": lambda adapter, rows, out: inspect(adapter, plot=out / "x.png"),
    "chat": lambda adapter, rows, out: load_session(adapter, quantize="none"),
    "eval": lambda adapter, rows, out: evaluate(adapter, str(rows), quantize="none"),
    "merge": lambda adapter, rows, out: merge(adapter, out / "m", quantize="none"),
    "export": lambda adapter, rows, out: export(adapter, out / "e", rank=1, quantize="none", max_kl=100.0),
}
SPECIAL = {"task_type": "SEQ_CLS", "init_lora_weights": "pissa_niter_4"}
# Keys of PEFT's configuration that decide nothing about what is read.
NEUTRAL = """auto_mapping peft_version base_model_name_or_path revision inference_mode peft_type r lora_alpha lora_dropout
    target_modules runtime_config ephemeral_gpu_offload loftq_config eva_config corda_config lora_ga_config megatron_core
    qalora_group_size"""
# What every command reads; fan_in_fan_out only says how the base stores its weights.
READ = """rank_pattern alpha_pattern use_rslora lora_bias bias modules_to_save trainable_token_indices fan_in_fan_out
    ensure_weight_tying exclude_modules layers_to_transform layers_pattern"""


def test_the_table_has_every_command_and_every_key_of_peft():
    assert READS.keys() == set(COMMANDS)
    keys = {field.name for field in dataclasses.fields(LoraConfig)}
    assert keys - {*NEUTRAL.split(), *READ.split()} == KINDS.keys() & keys


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("key", KINDS)
def test_a_command_refuses_by_name_what_the_table_does_not_give_it(key, command, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit_json(folder / "adapter_config.json", **{key: SPECIAL.get(key, [1])})
    rows = write_rows(tmp_path / "rows.jsonl", [("say 1", "it is 1")])
    if command in KINDS[key].commands:
        READS[command](folder, rows, tmp_path)
        return
    with pytest.raises(InputError, match=f"got {key}=") as caught:
        READS[command](folder, rows, tmp_path)
    assert "\n" not in str(caught.value)
    assert not [left for left in (tmp_path / "m", tmp_path / "e") if left.exists()]


@pytest.mark.filterwarnings("ignore:`lora_bias=True`", "ignore:Adapter 'default'. .* invalid shape")
def test_a_layer_without_a_bias_takes_no_lora_bias(tmp_path):
    base = save_chat_base(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"lora_bias must be of layers with a bias .*q_proj without one"):
        merge(tmp_path / "adapter", tmp_path / "out", quantize="none")


def test_a_tokenizer_larger_than_the_model_is_said(tmp_path, base, adapter):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<a>"])
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    tokenizer.save_pretrained(folder)
    console = Console(file=io.StringIO(), width=300)
    load_trained(read_adapter(folder), None, None, console, quantize="none")
    assert "has 1 tokens more than the base, and no embeddings of them were saved" in console.file.getvalue()  # type: ignore[attr-defined]
