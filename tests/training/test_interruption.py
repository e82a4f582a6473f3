"""What interrupts a run, from Ctrl-C to a full disk, leaves a checkpoint to go on from and one line that says so."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from qriemann import cli
from qriemann.training.checkpoints import newest_checkpoint
from qriemann.training.config import config_from_values
from qriemann.training.run import train
from qriemann.training.stop import StoppedBySignal
from tests.training.conftest import chat_rows, make_tokenizer, run_cli, save_model
from tests.training.test_lock import hold_until_killed


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """The report at the end of a run is seconds of drawing."""
    monkeypatch.setattr("qriemann.training.run.publish", lambda *arguments: None)


@pytest.fixture
def settings(tmp_path, model_folder, write_rows):
    return {
        "model_name_or_path": str(model_folder),
        "quantize": "none",
        "dataset_name": str(write_rows(chat_rows(24))),
        "output_dir": str(tmp_path / "out"),
        "lora_r": 4,
        "lora_dropout": 0.2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_size": 0,
        "display": "none",
    }


def final(folder) -> dict[str, torch.Tensor]:
    """The adapter that a run left, and what its last checkpoint says of the optimizer."""
    state = torch.load(newest_checkpoint(folder).path / "optimizer.pt", weights_only=True)["state"]
    tensors = {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
    return tensors | load_file(Path(folder) / "adapter_model.safetensors")


def assert_ends_alike(left, right) -> None:
    left, right = final(left), final(right)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def run_record(folder):
    return json.loads((Path(folder) / "run.json").read_text())


# Signals.


class Signal(TrainerCallback):
    """Sends this process signals in the middle of a step."""

    def __init__(self, number, step, times=1):
        self.number, self.step, self.times = number, step, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_finishes_the_step_saves_and_ends_with_the_shells_status(tmp_path, settings, number, status):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupted = {**settings, "output_dir": str(tmp_path / "interrupted")}
    stop = Signal(number, step=3)
    assert cli.reporting(lambda: train(config_from_values(interrupted), callbacks=[stop]) and 0) == status
    assert newest_checkpoint(tmp_path / "interrupted").path.name == "checkpoint-3"
    assert run_record(tmp_path / "interrupted")["status"] == "interrupted"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert run_cli(tmp_path, interrupted, "--resume") == 0
    assert run_cli(tmp_path, settings) == 0
    assert_ends_alike(tmp_path / "interrupted", tmp_path / "out")


def test_two_signals_stop_at_once(tmp_path, settings):
    with pytest.raises(StoppedBySignal):
        train(config_from_values(settings), callbacks=[Signal(signal.SIGTERM, step=4, times=2)])
    assert newest_checkpoint(tmp_path / "out").path.name == "checkpoint-2"


# A disk that is full.


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, settings, monkeypatch, capfd):
    save = torch.save

    def full(content, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(content, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        assert run_cli(tmp_path, settings) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "have room for a checkpoint" in line
    assert str(tmp_path / "out" / "checkpoint-2") in line
    assert run_cli(tmp_path, settings, "--resume") == 0
    assert run_record(tmp_path / "out")["resumed_from"].endswith("checkpoint-2")
    assert any("checkpoint-4" in line for line in run_record(tmp_path / "out")["passed_over"])
    assert run_cli(tmp_path, {**settings, "output_dir": str(tmp_path / "whole")}) == 0
    assert_ends_alike(tmp_path / "out", tmp_path / "whole")


# Another run, or not the same run.


def test_a_second_run_in_the_same_folder_is_refused_and_writes_nothing(tmp_path, settings, capfd):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    first = spawn.Process(target=hold_until_killed, args=(tmp_path / "out", ready))
    first.start()
    assert ready.wait(60)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert run_cli(tmp_path, settings) == 2
    assert f"held by process {first.pid}" in capfd.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert run_cli(tmp_path, {**settings, "output_dir": str(tmp_path / "beside"), "max_steps": 1}) == 0
    first.kill()
    first.join()
    assert run_cli(tmp_path, {**settings, "max_steps": 1}) == 0


def other_base(folder):
    """A model that differs from the fixture's in its weights alone."""
    return str(save_model(folder, make_tokenizer(), seed=1))


def test_what_changed_since_the_checkpoint_is_named_and_can_be_allowed_by_name(tmp_path, settings, capfd):
    assert run_cli(tmp_path, settings) == 0
    written = (tmp_path / "out" / "run.json").read_bytes()
    changed = {
        **settings,
        "learning_rate": 0.125,
        "max_steps": 8,
        "logging_steps": 3,
        "model_name_or_path": other_base(tmp_path / "other"),
    }
    assert run_cli(tmp_path, changed, "--resume") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "learning_rate 0.125 instead of 0.005" in line
    assert "max_steps 8 instead of 6" in line
    assert "not the base" in line
    assert "logging_steps" not in line
    assert "--allow base learning_rate max_steps" in line
    assert (tmp_path / "out" / "run.json").read_bytes() == written
    assert run_cli(tmp_path, changed, "--resume", "--allow", "base", "max_steps") == 2
    assert "learning_rate 0.125" in capfd.readouterr().err.splitlines()[-1]
    assert run_cli(tmp_path, changed, "--resume", "--allow", "base", "learning_rate", "max_steps") == 0
    assert run_record(tmp_path / "out")["result"]["steps"] == 8


def test_a_named_checkpoint_that_does_not_verify_is_refused_in_one_line(tmp_path, settings, capfd):
    assert run_cli(tmp_path, settings) == 0
    checkpoint = tmp_path / "out" / "checkpoint-4"
    os.truncate(checkpoint / "optimizer.pt", 100)
    assert run_cli(tmp_path, settings, "--resume", str(checkpoint)) == 2
    assert "optimizer.pt has 100 bytes" in capfd.readouterr().err.splitlines()[-1]
    assert run_cli(tmp_path, settings, "--resume", str(checkpoint), "--allow", "unverified") == 2
    assert "optimizer.pt cannot be loaded" in capfd.readouterr().err.splitlines()[-1]
