"""A downloaded base model is loaded as it is, or refused in one line that says what is wrong with it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from qriemann import load_base
from tests.base.test_load import refusal, tiny_tokenizer, write_gguf
from tests.base.test_load import tiny_config as tied_config
from tests.models import edit_json

CONFIG = "config.json"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = tied_config()
    config.tie_word_embeddings = False
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pristine(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "base"))


def change(folder: Path, name: str, to: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Without `to` the tensor is left out."""
    tensors = load_file(folder / "model.safetensors")
    before = tensors.pop(name)
    if to is not None:
        tensors[name] = to(before)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def to(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return to


def index_elsewhere(folder: Path) -> None:
    secret = folder.parent / "secret.safetensors"
    (folder / "model.safetensors").rename(secret)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(secret), "../secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard elsewhere": (index_elsewhere, "must stay in its folder, got '../secret.safetensors'"),
    "a tokenizer elsewhere": (
        lambda f: edit_json(f / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"]),
        "must stay in its folder, got '../tokenizer.4.0.json'",
    ),
    "NaN in a linear layer": (lambda f: change(f, UP, set_one(math.nan)), f"NaN or infinities in {UP};"),
    "NaN in a norm": (lambda f: change(f, NORM, set_one(math.nan)), f"NaN or infinities in {NORM};"),
    "a tensor left out": (lambda f: change(f, UP, None), f"no weights for {UP},"),
    "a head left out": (lambda f: change(f, "lm_head.weight", None), "no weights for lm_head.weight,"),
    "a layer too many": (
        lambda f: edit_json(f / CONFIG, num_hidden_layers=3),
        "no weights for model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
        "model.layers.2.mlp.gate_proj.weight and 6 more,",
    ),
    "a tensor of another shape": (
        lambda f: change(f, UP, lambda x: torch.ones(3, 3)),
        f"{UP} of (3, 3) for (128, 64);",
    ),
    "a width that is no number": (
        lambda f: edit_json(f / CONFIG, hidden_size="x"),
        "'hidden_size' expected int, got str",
    ),
    "no heads": (lambda f: edit_json(f / CONFIG, num_attention_heads=0), "ZeroDivisionError"),
    "a list for a type": (lambda f: edit_json(f / CONFIG, model_type=["llama"]), "check its config.json"),
}


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize(("hurt", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_model_is_one_line(folder, hurt, words, quantize):
    hurt(folder)
    assert words in refusal(folder, quantize=quantize)


def test_a_checkpoint_stored_in_4_bit_with_a_scale_that_is_no_number_is_refused(folder, tmp_path):
    model, tokenizer = load_base(folder, device="cpu")
    stored = tmp_path / "stored"
    model.save_pretrained(stored)
    tokenizer.save_pretrained(stored)
    load_base(stored, device="cpu")
    change(stored, f"{UP}.nested_absmax", lambda x: x * math.nan)
    assert f"NaN or infinities in {UP};" in refusal(stored, device="cpu")


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_a_gguf_file_is_held_to_the_same(model, tmp_path, quantize):
    path, config = tmp_path / "tiny.gguf", tied_config()
    torch.manual_seed(0)
    tied = LlamaForCausalLM(config)
    tied.config.num_hidden_layers = 3
    write_gguf(path, tied)
    assert "no weights for model.layers.2.input_layernorm.weight" in refusal(path, quantize=quantize)
    tied.config.num_hidden_layers = 2
    set_one(math.nan)(tied.state_dict()[UP])
    write_gguf(path, tied)
    assert f"NaN or infinities in {UP};" in refusal(path, quantize=quantize)
