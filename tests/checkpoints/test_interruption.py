"""What interrupts a run, from Ctrl-C to a full disk, leaves a checkpoint to go on from and one line that says so."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from qriemann.checkpoints.manifest import newest_checkpoint
from qriemann.checkpoints.signals import StoppedBySignal
from qriemann.folder import records
from qriemann.folder.contents import curve
from qriemann.reporting import reporting
from tests.folder.test_lock import hold_until_killed
from tests.recipe_fixtures import make_tokenizer, run_cli, save_model, train_on


@pytest.fixture
def settings(settings):
    return {
        **settings,
        "lora_dropout": 0.2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_size": 0,
    }


@pytest.fixture
def whole(settings, tmp_path_factory) -> Path:
    """The folder of this run when nothing interrupts it, trained once for all tests."""
    folder = tmp_path_factory.getbasetemp() / "uninterrupted"
    if not folder.exists():
        train_on({**settings, "output_dir": str(folder)})
    return folder


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
def test_one_signal_finishes_the_step_saves_and_ends_with_the_shells_status(tmp_path, settings, whole, number, status):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = Signal(number, step=3)
    assert reporting(lambda: train_on(settings, callbacks=[stop]) and 0) == status
    assert newest_checkpoint(tmp_path / "out").path.name == "checkpoint-3"
    assert run_record(tmp_path / "out")["status"] == "interrupted"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert run_cli(tmp_path, settings, "--resume") == 0
    assert_ends_alike(tmp_path / "out", whole)


def test_two_signals_stop_at_once(tmp_path, settings):
    with pytest.raises(StoppedBySignal):
        train_on(settings, callbacks=[Signal(signal.SIGTERM, step=4, times=2)])
    assert newest_checkpoint(tmp_path / "out").path.name == "checkpoint-2"


class SignalInEvaluation(TrainerCallback):
    """Sends this process one signal while the rows of an evaluation are computed."""

    def __init__(self, step):
        self.step = step

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            os.kill(os.getpid(), signal.SIGTERM)


EVALUATED = {"eval_size": 4, "eval_strategy": "steps", "eval_steps": 6, "eval_on_start": False}


@pytest.mark.parametrize("last", [6, 7], ids=["in the last step", "before the last step"])
def test_a_signal_in_an_evaluation_leaves_a_checkpoint_though_none_was_due(tmp_path, settings, last):
    settings = {**settings, **EVALUATED, "max_steps": last, "save_strategy": "no"}
    interrupted = {**settings, "output_dir": str(tmp_path / "interrupted")}
    stop = SignalInEvaluation(6)
    assert reporting(lambda: train_on(interrupted, callbacks=[stop]) and 0) == 143
    assert newest_checkpoint(tmp_path / "interrupted").path.name == f"checkpoint-{last}"
    assert run_record(tmp_path / "interrupted")["reason"] == "SIGTERM"
    assert run_cli(tmp_path, interrupted, "--resume") == 0
    assert run_cli(tmp_path, settings) == 0
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("interrupted", "out"))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_a_signal_is_answered_by_a_save_where_only_the_best_are_saved(tmp_path, settings):
    best = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "greater_is_better": True, "eval_steps": 1}
    settings = {**settings, **EVALUATED, **best}
    with pytest.raises(StoppedBySignal):
        train_on(settings, callbacks=[Signal(signal.SIGTERM, step=5)])
    assert newest_checkpoint(tmp_path / "out").path.name == "checkpoint-5"


def test_a_signal_in_the_evaluation_after_the_last_epoch_leaves_the_adapter_and_no_push(
    tmp_path, settings, monkeypatch
):
    pushed = []
    monkeypatch.setattr("qriemann.training.train.publish", lambda *arguments, **_: pushed.append(arguments))
    settings = {**settings, **EVALUATED, "eval_strategy": "epoch", "save_strategy": "no", "max_steps": -1}
    with pytest.raises(StoppedBySignal):
        train_on({**settings, "num_train_epochs": 1}, callbacks=[SignalInEvaluation(10)])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert run_record(tmp_path / "out")["status"] == "interrupted"
    assert pushed == []


# A disk that is full.


def assert_told_of_a_full_disk(folder, error):
    line = error.splitlines()[-1]
    assert "cannot write the checkpoint" in line
    assert "No space left on device" in line
    assert str(newest_checkpoint(folder).path) in line
    assert run_record(folder)["status"] == "failed: OSError"
    assert "No space left" in run_record(folder)["reason"]


def no_room(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("last", ["qriemann.training.train.save_adapter", "qriemann.training.train.plot_losses"])
def test_an_end_of_a_run_that_finds_no_room_is_one_line(tmp_path, settings, monkeypatch, capfd, last):
    with monkeypatch.context() as patched:
        patched.setattr(last, no_room)
        assert run_cli(tmp_path, {**settings, "max_steps": 2}) == 2
    assert_told_of_a_full_disk(tmp_path / "out", capfd.readouterr().err)
    assert run_cli(tmp_path, {**settings, "max_steps": 2}, "--resume") == 0
    assert run_record(tmp_path / "out")["result"]["steps"] == 2


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, settings, whole, monkeypatch, capfd):
    save = torch.save

    def full(content, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(content, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        assert run_cli(tmp_path, settings) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "cannot write the checkpoint" in line
    assert str(tmp_path / "out" / "checkpoint-2") in line
    assert run_cli(tmp_path, settings, "--resume") == 0
    assert run_record(tmp_path / "out")["resumed_from"].endswith("checkpoint-2")
    assert any("checkpoint-4" in line for line in run_record(tmp_path / "out")["passed_over"])
    assert_ends_alike(tmp_path / "out", whole)


# What the records say.


class Poison(TrainerCallback):
    """Writes NaN into a trained tensor when the training ends."""

    def on_train_end(self, args, state, control, model, **kwargs):
        next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(math.nan)


def test_an_adapter_with_nan_is_not_saved_as_finished(tmp_path, settings, capfd):
    settings = {**settings, "save_strategy": "no", "max_steps": 1}
    assert reporting(lambda: train_on(settings, callbacks=[Poison()]) and 0) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "not finite in" in line
    assert "lora_B" in line
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert run_record(tmp_path / "out")["status"] == "failed: InputError"
    assert run_record(tmp_path / "out")["reason"] in line


class SpoilStep(TrainerCallback):
    """One gradient is NaN in the given step."""

    def __init__(self, step):
        self.step, self.now = step, False

    def on_train_begin(self, args, state, control, model, **kwargs):
        parameter = next(p for name, p in model.named_parameters() if "lora_A" in name)
        parameter.register_hook(lambda gradient: gradient * math.nan if self.now else gradient)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step == self.step - 1


def test_run_json_and_the_metrics_of_a_resumed_run_are_those_of_the_whole(tmp_path, settings):
    settings = {**settings, **EVALUATED, "eval_steps": 2, "logging_steps": 3, "eval_on_start": True}
    interrupted = {**settings, "output_dir": str(tmp_path / "interrupted"), "resume": None}
    train_on(settings, callbacks=[SpoilStep(2)])
    with pytest.raises(StoppedBySignal):
        train_on(interrupted, callbacks=[SpoilStep(2), Signal(signal.SIGINT, step=4)])
    stopped = run_record(tmp_path / "interrupted")
    assert (stopped["status"], stopped["reason"], stopped["steps"]["done"]) == ("interrupted", "SIGINT", 4)
    # The second time, the run is finished already.
    for ends in (["interrupted"], ["interrupted", "finished"]):
        train_on({**interrupted, "resume": "auto"})
        assert_told_alike(tmp_path / "interrupted", tmp_path / "out")
        assert [process["status"] for process in run_record(tmp_path / "interrupted")["earlier"]] == ends


def assert_told_alike(left, right):
    left, right = ((run_record(folder), records.read_metrics(folder)) for folder in (left, right))
    assert left[0]["steps"] == right[0]["steps"]
    (event,) = left[0]["steps"]["events"]
    assert (event["step"], len(event["skipped"]["rows"])) == (2, 2)
    for key in ("steps", "train_loss", "eval_loss_before", "eval_loss", "orthonormality_drift"):
        assert left[0]["result"][key] == right[0]["result"][key]
    assert left[0]["result"]["tokens_per_s"] > 0
    for key in ("loss", "eval_loss", "num_tokens", "entropy", "mean_token_accuracy", "learning_rate"):
        assert curve(left[1], key) == curve(right[1], key), key


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
    first.kill()
    first.join()
    assert run_cli(tmp_path, {**settings, "max_steps": 1}) == 0


def test_what_changed_since_the_checkpoint_is_named_and_can_be_allowed_by_name(tmp_path, settings, whole, capfd):
    shutil.copytree(whole, tmp_path / "out")
    written = (tmp_path / "out" / "run.json").read_bytes()
    changed = {
        **settings,
        "learning_rate": 0.125,
        "max_steps": 8,
        "logging_steps": 3,
        # Another model in its weights alone.
        "model_name_or_path": str(save_model(tmp_path / "other", make_tokenizer(), seed=1)),
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


def test_a_named_checkpoint_that_does_not_verify_is_refused_in_one_line(tmp_path, settings, whole, capfd):
    checkpoint = shutil.copytree(whole, tmp_path / "out") / "checkpoint-4"
    os.truncate(checkpoint / "optimizer.pt", 100)
    assert run_cli(tmp_path, settings, "--resume", str(checkpoint)) == 2
    assert "optimizer.pt has 100 bytes" in capfd.readouterr().err.splitlines()[-1]
    assert run_cli(tmp_path, settings, "--resume", str(checkpoint), "--allow", "unverified") == 2
    assert "optimizer.pt cannot be loaded" in capfd.readouterr().err.splitlines()[-1]
