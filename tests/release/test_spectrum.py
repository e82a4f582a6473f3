"""What `inspect` says of an adapter, against the dense matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qriemann.adapters.spectrum import LayerSpectrum
from qriemann.cli import main
from qriemann.release.inspect import dead, inspect, saturated
from qriemann.release.weights import Checkpoint


def test_the_spectrum_is_that_of_the_dense_change_relative_to_the_weight(base: Path, adapter: Path, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = Checkpoint(base)
    spectra = inspect(adapter, plot=tmp_path / "plot.png")
    assert len(spectra) == 14
    for spectrum in spectra:
        b, a = (tensors[f"base_model.model.{spectrum.name}.lora_{side}.weight"].double() for side in "BA")
        sigma = torch.linalg.svdvals(2 * b @ a)
        assert spectrum.sigma == pytest.approx(sigma[:4].tolist(), rel=1e-9)
        weight = weights[f"{spectrum.name}.weight"].double()
        assert spectrum.relative_norm == pytest.approx((sigma.norm() / weight.norm()).item(), rel=1e-6)


def test_the_effective_rank_counts_equal_directions():
    assert LayerSpectrum("q", [2.0, 2.0, 2.0, 0.0], 4, None).effective_rank == pytest.approx(3)
    assert LayerSpectrum("q", [5.0, 0.0], 2, None).effective_rank == pytest.approx(1)
    assert LayerSpectrum("q", [0.0, 0.0], 2, None).effective_rank == 0
    # Shares 3/4 and 1/4: exp(3/4 log 4/3 + 1/4 log 4).
    expected = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert LayerSpectrum("q", [3.0, 1.0], 2, None).effective_rank == pytest.approx(expected)


def test_dead_and_saturated_layers_are_named(adapter: Path, tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {name: tensor.clone() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    still, flat = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"
    tensors[f"base_model.model.{still}.lora_B.weight"].zero_()
    tensors[f"base_model.model.{flat}.lora_A.weight"] = torch.eye(4, 64)
    tensors[f"base_model.model.{flat}.lora_B.weight"] = torch.eye(64, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    assert main(["inspect", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    spectra = inspect(folder, plot=tmp_path / "again.png")
    assert dead(spectra) == [still]
    assert flat in saturated(spectra)
    assert f"1 of 14 layers are dead (below 0.001 of the median layer's norm): {still}" in shown


def test_the_picture_is_drawn_where_it_is_asked_for(adapter: Path, tmp_path):
    path = tmp_path / "plot.png"
    assert main(["inspect", str(adapter), "--plot", str(path)]) == 0
    with Image.open(path) as image:
        colors = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    # One colour for each of the seven kinds of layer, their mixtures, axes and paper.
    assert len(colors) > 50


def test_without_its_base_an_adapter_is_shown_without_relative_norms(adapter: Path, tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    config = (folder / "adapter_config.json").read_text()
    base = json.loads(config)["base_model_name_or_path"]
    (folder / "adapter_config.json").write_text(config.replace(base, str(tmp_path / "gone")))
    assert main(["inspect", str(folder)]) == 0
    assert "norms are not relative to the base" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(folder), "--base", str(tmp_path / "gone")]) == 2
