"""Every command loads the base as training had it, from the record beside the adapter."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qriemann.adapters.saved import read_adapter
from qriemann.chat.session import load_session
from qriemann.checkpoints.fingerprints import base_fingerprint
from qriemann.cli import main
from qriemann.errors import InputError
from qriemann.evaluation.evaluate import evaluate
from qriemann.evaluation.trained import dequantized_weights, load_trained
from qriemann.folder.records import recorded_base
from qriemann.release.export import export
from qriemann.release.merge import merge
from qriemann.training.train import TrainResult
from tests.recipe_fixtures import chat_rows, train_in
from tests.release.conftest import save_chat_base


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Two steps on an unquantized base, with a checkpoint and held-out rows."""
    folder = tmp_path_factory.mktemp("floats")
    base, held_out = save_chat_base(folder / "base"), str(folder / "rows.jsonl")
    changes = {"quantize": "none", "dataset_eval_name": held_out, "max_steps": 2, "save_steps": 1}
    return train_in(folder, base, chat_rows(8), **changes)


def loaded(folder: Path, **options: Any) -> Any:
    return load_trained(read_adapter(folder), None, None, Console(quiet=True), **options)


def test_eval_finds_the_held_out_loss_of_training(run):
    (found,) = evaluate(run.output_dir, str(run.output_dir.parent / "rows.jsonl"))
    assert found.loss.value == pytest.approx(run.eval_loss, rel=1e-5)


@pytest.mark.parametrize("folder", ["", "checkpoint-1", "exported"])
def test_the_run_its_checkpoints_and_exports_remember_that_the_base_was_not_quantized(run, folder):
    path = run.output_dir / folder
    if folder == "exported":
        export(run.output_dir, path, rank=2, max_kl=100.0)
    assert recorded_base(path)["quantized"] is False
    trained = loaded(path)
    assert not trained.quantized
    assert not hasattr(load_session(path).model.base_model.model.model.layers[0].mlp.up_proj.weight, "quant_state")
    shutil.rmtree(path) if folder == "exported" else None


def test_an_option_that_contradicts_the_record_is_named(run, tmp_path, capsys):
    console = Console(file=io.StringIO(), width=300)
    trained = load_trained(read_adapter(run.output_dir), None, None, console, quantize="nf4")
    assert trained.quantized
    said = "the adapter was trained on the base unquantized, and is read on it in 4 bit"
    assert said in console.file.getvalue()  # type: ignore[attr-defined]
    assert said in load_session(run.output_dir, quantize="nf4").notes[0]
    rows = str(run.output_dir.parent / "rows.jsonl")
    assert main(["eval", str(run.output_dir), rows, "--quantize", "nf4", "--max-rows", "2"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_there_are_no_4_bit_weights_to_merge_into_without_a_4_bit_base(run, tmp_path):
    with pytest.raises(InputError, match=r"was trained on an unquantized base"):
        merge(run.output_dir, tmp_path / "out", into="nf4-dequantized")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # a fresh process
def test_merge_prefers_the_base_that_was_trained_on(run, tmp_path):
    result = merge(run.output_dir, tmp_path / "out", data=str(run.output_dir.parent / "rows.jsonl"))
    assert result.accepted
    (verdict,) = result.verdicts
    # Nothing but rounding is left, and no more is allowed.
    assert (verdict.candidate.into, verdict.candidate.max_kl) == ("original", 1e-5)
    assert "the adapter was trained on it" in result.report["prefer"]["why"]
    assert verdict.found["loss"] == pytest.approx(run.eval_loss, rel=1e-4)


RECORDS = {
    "NF4 once": {"quant_type": "nf4", "double_quant": False, "dtype": "float32"},
    "FP4": {"quant_type": "fp4", "double_quant": True, "dtype": "float32"},
    "NF4 from bfloat16": {"quant_type": "nf4", "double_quant": True, "dtype": "bfloat16"},
    "FP4 once from float16": {"quant_type": "fp4", "double_quant": False, "dtype": "float16"},
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_4_bit_weights_are_those_of_training(record, base, adapter, tmp_path):
    dtype = getattr(torch, record["dtype"])
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=record["quant_type"],
        bnb_4bit_use_double_quant=record["double_quant"],
        bnb_4bit_compute_dtype=dtype,
    )
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config, device_map="cpu")
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    loaded_as = {"quantized": True, "device": "cpu", **record, "fingerprint": base_fingerprint(expected)}
    (folder / "run.json").write_text(json.dumps({"model": loaded_as}))
    trained = loaded(folder)
    assert not trained.notes
    right = dequantized_weights(expected)
    assert set(trained.dequantized) == set(right)
    for name in right:
        # A proof computes with the weights of training, in float32.
        assert trained.dequantized[name].dtype == torch.float32
        assert torch.equal(trained.dequantized[name], right[name].float()), name
    in_training = load_session(folder).model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert in_training.compute_dtype == dtype


def test_without_a_record_the_base_is_in_4_bit(adapter):
    assert recorded_base(adapter) == {}
    assert loaded(adapter).quantized
    assert not loaded(adapter, quantize="none").quantized
