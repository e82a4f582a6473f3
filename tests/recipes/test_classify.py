"""The recipe outside chat: images whose label is no linear function of the pixels, learned under any method."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qriemann.optim.methods import METHODS

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("classify")


def test_no_linear_map_of_the_pixels_tells_the_directions(script):
    (x, y), (held_x, held_y) = (script.make_images(2048, seed).tensors for seed in (0, 1))
    x, held_x = x.flatten(1), held_x.flatten(1)
    targets = torch.nn.functional.one_hot(y, 8).float()
    ridge = torch.linalg.solve(x.mT @ x + 100 * torch.eye(x.shape[1]), x.mT @ targets)
    right = ((held_x @ ridge).argmax(1) == held_y).float().mean()
    # Chance is an eighth; its standard deviation over 2048 images 0.007.
    assert right < 0.2


def test_only_the_adapter_and_the_classifier_are_trained(script):
    trainable = {name for name, p in script.make_model(0).named_parameters() if p.requires_grad}
    assert {name for name in trainable if ".lora_" not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    # Query, key, value, output and the two layers of the MLP, in two blocks, each with A and B.
    assert sum(".lora_" in name for name in trainable) == 2 * 6 * 2


@pytest.mark.parametrize("method", ["riemannion", "adamw"])
def test_accuracy_rises_from_chance_in_thirty_steps(script, method):
    accuracy = script.classify(method, steps=30)
    assert accuracy.before < 0.2
    assert accuracy.after > accuracy.before + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_the_directions(script, method):
    assert script.classify(method).after > 0.4


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--method", "scaled-gd", "--steps", "1"], 0, "scaled-gd: "),
        (["--method", "rieman"], 2, "did you mean 'riemannion'"),
    ],
)
def test_the_command_prints_one_line(script, capsys, monkeypatch, options, status, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert script.main(options) == status
    printed = capsys.readouterr()
    (line,) = (printed.err if status else printed.out).splitlines()
    assert said in line
