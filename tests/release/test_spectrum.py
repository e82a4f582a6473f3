"""The singular values of an adapter, and what `inspect` says of them, against the dense matrices."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qriemann.adapters.spectrum import LayerSpectrum, read_spectra
from qriemann.cli import main
from qriemann.release.inspect import inspect
from qriemann.release.weights import read_checkpoint
from tests.release.folders import plain_adapter


def test_the_spectrum_is_that_of_the_dense_change_relative_to_the_weight(base, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = read_checkpoint(base)
    spectra = inspect(adapter, plot=tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        colors = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    # Shades of the layers, one colour for each of the seven kinds, their mixtures, axes and paper.
    assert len(colors) > 50
    assert len(spectra) == 14
    for spectrum in spectra:
        b, a = (tensors[f"base_model.model.{spectrum.name}.lora_{side}.weight"].double() for side in "BA")
        sigma = torch.linalg.svdvals(2 * b @ a)
        assert spectrum.sigma == pytest.approx(sigma[:4].tolist(), rel=1e-9)
        weight = weights[f"{spectrum.name}.weight"].double()
        assert spectrum.relative_norm == pytest.approx((sigma.norm() / weight.norm()).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaling_patterns_and_half_precision_are_those_of_the_dense_change(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    # So tall that the QR goes by blocks.
    a, b = torch.randn(3, 20, generator=generator).to(dtype), torch.randn(9000, 3, generator=generator).to(dtype)
    options = {"lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"up_proj": 12}}
    (layer,) = read_spectra(plain_adapter(tmp_path / "adapter", a, b, **options))
    dense = torch.linalg.svdvals(12 / 3**0.5 * b.double() @ a.double())
    assert layer.sigma == pytest.approx(dense[:3].tolist(), rel=1e-9)
    shares = dense[:3] / dense[:3].sum()
    assert layer.effective_rank == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-9)


def test_an_adapter_is_looked_at_without_peft(tmp_path):
    folder = plain_adapter(tmp_path / "adapter", torch.ones(2, 8), torch.ones(8, 2))
    heavy = {"peft", "transformers", "datasets", "trl", "bitsandbytes"}
    for words in (["inspect", str(folder)], ["report", str(folder)], ["push", str(folder), "me/tiny", "--dry-run"]):
        script = f"import sys\nfrom qriemann.cli import main\nassert main({words!r}) == 0\nprint(*sys.modules)"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert heavy.isdisjoint(done.stdout.splitlines()[-1].split()), words


def test_the_effective_rank_counts_equal_directions():
    # Shares 3/4 and 1/4: exp(3/4 log 4/3 + 1/4 log 4).
    uneven = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    for sigma, expected in (([2.0, 2.0, 2.0, 0.0], 3), ([5.0, 0.0], 1), ([0.0, 0.0], 0), ([3.0, 1.0], uneven)):
        assert LayerSpectrum("q", sigma, len(sigma)).effective_rank == pytest.approx(expected)


def test_dead_and_saturated_layers_are_named(adapter, tmp_path, capsys):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = {name: tensor.clone() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    still, flat = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"
    tensors[f"base_model.model.{still}.lora_B.weight"].zero_()
    tensors[f"base_model.model.{flat}.lora_A.weight"] = torch.eye(4, 64)
    tensors[f"base_model.model.{flat}.lora_B.weight"] = torch.eye(64, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    assert main(["inspect", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    spectra = {one.name: one for one in inspect(folder, plot=tmp_path / "again.png")}
    assert spectra[flat].effective_rank == pytest.approx(4)
    assert "of 14 layers are saturated (effective rank at least 90% of the rank" in shown
    assert f"1 of 14 layers are dead (below 0.001 of the median layer's norm): {still}" in shown


def test_without_its_base_an_adapter_is_shown_without_relative_norms(adapter, tmp_path, capsys):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = (folder / "adapter_config.json").read_text()
    base = json.loads(config)["base_model_name_or_path"]
    (folder / "adapter_config.json").write_text(config.replace(base, str(tmp_path / "gone")))
    assert main(["inspect", str(folder)]) == 0
    assert "norms are not relative to the base" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(folder), "--base", str(tmp_path / "gone")]) == 2
