"""`export --to`: what is written, what is judged, and what becomes of it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import gguf
import pytest

from qriemann.cli import main
from qriemann.errors import InputError
from qriemann.gguf.architectures import Layout
from qriemann.release.export_gguf import export_gguf
from qriemann.release.push import push
from qriemann.release.report import write_report
from tests.gguf.models import byte_tokenizer
from tests.release.conftest import save_adapter, save_chat_base


@pytest.fixture(scope="module")
def exported(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter's folder with merged files and an adapter file in it."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(adapter, folder)
    # What is not the model under any bound that is near one.
    assert main(["export", str(folder), str(folder / "tiny"), "--to", "gguf", "--type", "f16,q4_0"]) == 0
    assert main(["export", str(folder), str(folder / "lora"), "--to", "gguf-adapter"]) == 0
    return folder


def test_merged_files_come_with_the_ladder_and_a_modelfile(exported):
    names = {path.name for path in (exported / "tiny").iterdir()}
    assert {"tiny-F16.gguf", "Modelfile", "README.md", "gguf_report.json"} <= names
    assert not any("F32" in name for name in names)
    report = json.loads((exported / "tiny" / "gguf_report.json").read_text())
    assert report["proved"]
    assert report["accepted"]
    assert report["exact"]["largest_difference"] < 1e-4
    half, small = report["merged"]
    assert half["accepted"]
    assert half["mean_kl"] < small["mean_kl"]
    assert small["bytes"] < half["bytes"] == (exported / "tiny" / "tiny-F16.gguf").stat().st_size
    assert report["stops"] == ["<|im_end|>"]


def test_a_rung_that_is_too_far_is_rejected_by_name(adapter, exported, tmp_path):
    half, small = json.loads((exported / "tiny" / "gguf_report.json").read_text())["merged"]
    between = math.sqrt(half["mean_kl"] * small["mean_kl"])
    result = export_gguf(adapter, tmp_path / "tiny", types=["f16", "q4_0"], max_kl=between)
    assert result.accepted
    assert [verdict.accepted for verdict in result.verdicts] == [True, False]
    names = {path.name for path in result.folder.iterdir()}
    assert {"tiny-F16.gguf", "tiny-Q4_0.gguf.rejected"} <= names
    assert "FROM ./tiny-F16.gguf" in (result.folder / "Modelfile").read_text()
    assert "rejected: tiny-Q4_0.gguf: mean KL to the trained model is" in result.report["conclusions"][1]


def test_files_that_llama_cpp_computes_otherwise_are_rejected(adapter, tmp_path, monkeypatch, capsys):
    """As if the permutation of one layer had been forgotten, in the files and in the look at the weights."""
    as_stored = Layout.as_stored

    def without_one(self, name, tensor):
        return tensor if name == "model.layers.0.self_attn.q_proj.weight" else as_stored(self, name, tensor)

    monkeypatch.setattr(Layout, "as_stored", without_one)
    assert main(["export", str(adapter), str(tmp_path / "tiny"), "--to", "gguf-adapter"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.rejected"]
    said = " ".join(capsys.readouterr().out.split())
    assert "rejected: llama.cpp does not compute what was trained: log-probabilities differ by up to" in said


def test_without_llama_cpp_the_files_are_called_unproved(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qriemann.gguf.compare.has_engine", lambda: False)
    assert main(["export", str(adapter), str(tmp_path / "tiny"), "--to", "gguf", "--type", "q8_0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "unproved: nothing has run these files; pip install 'qriemann[gguf]'" in said
    assert gguf.GGUFReader(tmp_path / "tiny" / "tiny-Q8_0.gguf").get_field("general.architecture").contents() == "llama"
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "unproved" in card
    assert "accepted" not in card


def test_the_card_of_the_run_says_how_to_run_the_files(exported):
    card = (exported / "README.md").read_text()
    assert "llama-cli -m tiny/tiny-F16.gguf" in card or "llama-cli -m tiny/tiny-Q4_0.gguf" in card
    assert "ollama create tuned -f tiny/Modelfile" in card
    assert "--lora lora/lora-LoRA-F32.gguf --jinja --chat-template-file lora/chat_template.jinja" in card
    assert "| tiny-F16.gguf |" in card
    # The runs above have no example of a question; tests/gguf/test_embedded.py runs these lines.
    assert "ask as the rows of the training do" in card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(code, "card", "exec")


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Setting `save_embedding",
    "ignore:`lora_bias=True`",
    "ignore:Adapter 'default'. .* invalid shape",
)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "lora_bias": True, "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 70]},
    ],
    ids=["biases and a head", "LoRA on a tied head", "tokens"],
)
def test_whatever_can_be_merged_is_in_the_merged_file(options, tmp_path):
    """On a base whose head is its embeddings."""
    base = tmp_path / "base"
    save_chat_base(base, tokenizer=byte_tokenizer(), tie_word_embeddings=True, attention_bias=True)
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    result = export_gguf(adapter, tmp_path / "tiny", types=["f32"])
    assert result.accepted
    assert result.report["exact"]["largest_difference"] < 1e-4
    with pytest.raises(InputError, match="use --to gguf"):
        export_gguf(adapter, tmp_path / "lora", to="gguf-adapter")


def test_push_takes_the_files_along(exported):
    names = {upload.name for upload in push(exported, "someone/tuned", dry_run=True, base_id="someone/base").uploads}
    assert {"adapter_model.safetensors", "tiny/tiny-F16.gguf", "tiny/Modelfile", "lora/lora-LoRA-F32.gguf"} <= names
    alone = push(exported / "tiny", "someone/tuned-GGUF", dry_run=True)
    names = {upload.name for upload in alone.uploads}
    assert {"README.md", "tiny-F16.gguf", "Modelfile", "gguf_report.json"} <= names
    assert not any(name.endswith(".rejected") for name in names)
    page = write_report(exported / "tiny").read_text()
    assert "tiny-F16.gguf" in page
    assert "mean KL" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"types": ["q4_k_m"]}, "llama-quantize NAME-F16.gguf NAME-Q4_K_M.gguf Q4_K_M"),
        ({"types": ["int4"]}, "type must be one of f32, .*, got int4"),
        ({"types": []}, "type must be one of f32, .*, got none"),
        ({"to": "onnx"}, "to must be gguf or gguf-adapter, got 'onnx'"),
        ({"max_kl": -1.0}, "max_kl must be a number of nats >= 0, got -1.0"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_loaded(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export_gguf(tmp_path / "nothing", tmp_path / "out", **arguments)
