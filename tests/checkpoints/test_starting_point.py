"""Where `--resume auto` begins: at the newest checkpoint that can be loaded, or anew where no save was ever finished."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qriemann.checkpoints import manifest
from qriemann.checkpoints.manifest import MANIFEST
from qriemann.config import settings_from
from qriemann.errors import InputError
from qriemann.folder.files import sha256
from qriemann.training.prepare import prepare
from qriemann.training.train import train
from tests.recipe_fixtures import run_cli, train_on, with_rate


@pytest.fixture
def settings(settings):
    return {
        **settings,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "eval_size": 2,
        "eval_on_start": True,
    }


def resumed_from(folder) -> str | None:
    return json.loads((folder / "run.json").read_text())["resumed_from"]


def test_the_command_that_goes_on_with_a_run_also_starts_it(tmp_path, settings):
    out = tmp_path / "out"
    assert run_cli(tmp_path, settings, "--resume", "auto") == 0
    assert resumed_from(out) is None
    whole = (out / "adapter_model.safetensors").read_bytes()
    # As a kill in the first save leaves it: records of some steps, and a checkpoint without a manifest.
    shutil.rmtree(out / "checkpoint-2")
    (out / "checkpoint-1" / MANIFEST).unlink()
    os.truncate(out / "checkpoint-1" / "optimizer.pt", 100)
    (out / "adapter_model.safetensors").unlink()
    (out / "adapter_config.json").unlink()
    assert run_cli(tmp_path, settings, "--resume", "auto") == 0
    assert resumed_from(out) is None
    assert (out / "adapter_model.safetensors").read_bytes() == whole
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in lines if "eval_loss" in record].count(0) == 1


def test_auto_begins_nothing_anew_over_somebodys_work(tmp_path, settings, capfd):
    assert run_cli(tmp_path, settings) == 0
    out = tmp_path / "out"
    for folder in (out / "checkpoint-1", out / "checkpoint-2"):
        os.truncate(folder / "optimizer.pt", 100)
    assert run_cli(tmp_path, settings, "--resume", "auto") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "checkpoint-2: optimizer.pt has 100 bytes" in line
    assert "checkpoint-1: optimizer.pt has 100 bytes" in line
    for folder in (out / "checkpoint-1", out / "checkpoint-2"):
        shutil.rmtree(folder)
    # An adapter whose run saved no checkpoint.
    assert run_cli(tmp_path, settings, "--resume", "auto") == 2
    (out / "adapter_model.safetensors").unlink()
    (out / "adapter_config.json").unlink()
    # Another tool's checkpoint.
    (out / "run.json").unlink()
    (out / "checkpoint-500").mkdir()
    assert run_cli(tmp_path, settings, "--resume", "auto") == 2
    assert "checkpoint-500" in capfd.readouterr().err.splitlines()[-1]


def test_a_checkpoint_is_verified_once_and_a_change_before_the_first_step_is_noticed(tmp_path, settings, monkeypatch):
    train_on(settings)
    read = []
    monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path) or sha256(path))
    again = {**settings, "resume": True, "save_strategy": "no"}
    train_on(again)
    assert {path.parent for path in read} == {tmp_path / "out" / "checkpoint-2"}
    assert len(read) == len(set(read)) > 0
    prepared = prepare(settings_from(with_rate(again)))
    os.utime(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", (1, 1))
    with pytest.raises(InputError, match="changed while the run was being prepared"):
        train(prepared)
    prepared = prepare(settings_from(with_rate(again)))
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-3")
    with pytest.raises(InputError, match="changed while the run was being prepared"):
        train(prepared)


def test_what_was_allowed_to_change_is_said(tmp_path, settings, capsys):
    settings = {**settings, "display": "plain", "learning_rate": 0.02}
    assert run_cli(tmp_path, settings) == 0
    words = ("--learning_rate", "0.001", "--alpha", "2", "--allow", "learning_rate", "alpha")
    assert run_cli(tmp_path, settings, "--resume", *words) == 0
    printed = capsys.readouterr().out
    assert "going on with learning_rate 0.001 instead of 0.02" in printed
    assert "going on with alpha 2.0 instead of 1.0 (it shaped the start alone)" in printed


def edit_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


def round_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    rounded = {name: tensor.to(torch.bfloat16).float() for name, tensor in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "named"),
    [(edit_config, "a base configured otherwise (rms_norm_eps 0.1 instead of 1e-06)"), (round_weights, "not the base")],
)
def test_a_base_that_is_not_the_same_to_the_last_bit_is_named(tmp_path, settings, capfd, change, named):
    base = Path(shutil.copytree(settings["model_name_or_path"], tmp_path / "base"))
    settings = {**settings, "model_name_or_path": str(base), "max_steps": 1, "eval_on_start": False, "eval_size": 0}
    assert run_cli(tmp_path, settings) == 0
    assert run_cli(tmp_path, settings, "--resume") == 0
    change(base)
    assert run_cli(tmp_path, settings, "--resume") == 2
    assert named in capfd.readouterr().err.splitlines()[-1]
    assert run_cli(tmp_path, settings, "--resume", "--allow", "base") == 0
