"""A merge where the card is smaller than the model: the CPU takes what does not fit, and the lines say so."""

from __future__ import annotations

import io
import json

import psutil
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qriemann.evaluation import proof, reload
from qriemann.release.merge import merge
from qriemann.release.weights import original_weights
from tests.base.test_load import tiny_config, write_gguf
from tests.test_device import OF_CUDA, put_card

GIB = 2**30


@pytest.mark.parametrize(
    ("dtype", "stored_gib", "card_gib", "host_gib", "expected"),
    [
        # 8 billion weights in float32 on 24 GiB, and on 80.
        ("float32", 30, 24, 64, ("float32", "cpu")),
        ("float32", 30, 80, 64, ("float32", "cuda")),
        ("bfloat16", 15, 40, 64, ("float32", "cuda")),
        # Neither holds it in float32.
        ("bfloat16", 15, 24, 16, ("bfloat16", "cpu")),
        # In 4 bit.
        ("bfloat16", 5.5, 24, 64, ("float32", "cuda")),
        ("float32", 0.5, None, 64, ("float32", "cpu")),
    ],
)
def test_the_proof_computes_on_the_card_only_what_fits_there(
    dtype, stored_gib, card_gib, host_gib, expected, tmp_path, monkeypatch
):
    (tmp_path / "config.json").write_text(json.dumps({"dtype": dtype}))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(int(stored_gib * GIB))  # sparse: takes no room
    if card_gib is not None:
        put_card(monkeypatch, (8, 9))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (card_gib * GIB, card_gib * GIB))
    memory = psutil.virtual_memory()._replace(available=host_gib * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert proof._compute_on(tmp_path) == expected


def test_a_base_that_fills_the_card_is_recorded_on_the_cpu(base, adapter, rows, tmp_path, monkeypatch):
    load, asked = proof.load_trained, []

    def short_on_the_card(*arguments, device=None, **options):
        asked.append(device)
        if device is None:
            raise proof.ShortMemoryError("out of memory while loading the base")
        return load(*arguments, device=device, **options)

    monkeypatch.setattr(proof, "load_trained", short_on_the_card)
    monkeypatch.setattr(proof, "compute_device", lambda: torch.device("cuda", 0))
    console = Console(file=io.StringIO(), width=200)
    assert merge(adapter, tmp_path / "out", data=str(rows), console=console).accepted
    assert asked == [None, "cpu"]
    assert "out of memory while loading the base: on the CPU instead" in console.file.getvalue()
    assert "in a fresh process, on cpu in float32" in console.file.getvalue()


def test_a_model_that_fills_the_card_in_the_fresh_process_is_compared_on_the_cpu(merged, tmp_path, monkeypatch):
    load, places = AutoModelForCausalLM.from_pretrained, []

    def short_on_the_card(*arguments, device_map, **options):
        places.append(device_map[""])
        if device_map[""] == "cuda":
            raise torch.OutOfMemoryError(OF_CUDA)
        return load(*arguments, device_map=device_map, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", short_on_the_card)
    folder = merged.result.folder / "nf4-dequantized"
    row = {"ids": [1, 2, 3, 4], "positions": [1, 2], "targets": [3, 4]}
    model = load(folder, dtype=torch.float32)
    recorded = tmp_path / "recorded.safetensors"
    proof.save_file({"0": next(reload.logits_of_rows(model, [row]))[1].contiguous()}, recorded)
    request = {"rows": [row], "recorded": str(recorded)}
    found = reload.load_and_compare(str(folder), "float32", "cuda", request)
    assert places == ["cuda", "cpu"]
    assert abs(found["mean_kl"]) < 1e-12


def test_the_original_weights_of_a_gguf_file_are_read_beside_the_card(tmp_path, monkeypatch):
    model = LlamaForCausalLM(tiny_config())
    write_gguf(tmp_path / "base.gguf", model)
    # On the card they would not load here, and would not add to the adapter's factors, which are in host memory.
    put_card(monkeypatch, (8, 9))
    weights = original_weights(str(tmp_path / "base.gguf"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights[name], model.state_dict()[name])
