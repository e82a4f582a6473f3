"""A truncated adapter is the best one of its rank, and is plain LoRA again."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qriemann.adapters.saved_tensors import LoraFactors
from qriemann.cli import main
from qriemann.release.export import export, truncate
from tests.models import relative
from tests.release.conftest import save_adapter, save_chat_base


def test_truncation_of_a_layer_that_changes_nothing_is_zero():
    small, lost, whole = truncate(LoraFactors(torch.zeros(8, 4), torch.randn(4, 6), 2.0), 2)
    assert not (small.b @ small.a).any()
    assert (lost, whole) == (0.0, 0.0)


def test_an_exported_adapter_loads_with_peft_and_computes_the_truncated_change(tmp_path):
    """With rslora, and with a layer that had a lower rank than the one asked for, which it keeps."""
    base = save_chat_base(tmp_path / "base")
    whole = save_adapter(base, tmp_path / "whole", r=6, use_rslora=True, rank_pattern={"v_proj": 2})
    result = export(whole, tmp_path / "small", rank=3, max_kl=10.0)
    assert result.accepted
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.folder)
    tensors = load_file(whole / "adapter_model.safetensors")
    squares = [0.0, 0.0]
    for name in result.report["relative_error"]["layers"]:
        b, a = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "BA")
        dense = 8 / math.sqrt(b.shape[1]) * b @ a
        u, sigma, vh = torch.linalg.svd(dense, full_matrices=False)
        rank = min(3, b.shape[1])
        layer = model.get_submodule(f"base_model.model.{name}")
        assert layer.lora_A["default"].weight.shape[0] == rank
        assert relative(layer.get_delta_weight("default"), u[:, :rank] * sigma[:rank] @ vh[:rank]) < 1e-5
        error = (sigma[rank:].norm() / sigma.norm()).item()
        assert result.report["relative_error"]["layers"][name] == pytest.approx(error, abs=1e-9)
        squares = [squares[0] + sigma[rank:].square().sum().item(), squares[1] + sigma.square().sum().item()]
    assert result.report["relative_error"]["total"] == pytest.approx(math.sqrt(squares[0] / squares[1]))


def test_a_rank_that_loses_too_much_is_rejected_with_the_figures(adapter, tmp_path, capsys):
    status = main(["export", str(adapter), str(tmp_path / "small"), "--rank", "1", "--max-kl", "1e-9"])
    assert status == 3
    assert [path.name for path in tmp_path.iterdir()] == ["small.rejected"]
    report = json.loads((tmp_path / "small.rejected" / "export_report.json").read_text())
    assert 1e-9 < report["merged"][0]["mean_kl"] < report["untrained_base"]["mean_kl"]
    assert "a higher --rank loses less" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_that_does_not_make_it_smaller_is_refused(rank, adapter, tmp_path, capsys):
    assert main(["export", str(adapter), str(tmp_path / "small"), "--rank", str(rank)]) == 2
    assert f"rank must be from 1 to 3, below the adapter's 4, got {rank}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
