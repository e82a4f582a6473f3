"""Interrupted and resumed is uninterrupted, bit for bit: parameters, optimizer state, rates, reported losses."""

from __future__ import annotations

import math
import os
import random
import shutil
import stat

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import qriemann
from qriemann.checkpoints.fingerprints import check_same_run
from qriemann.checkpoints.manifest import commit
from qriemann.checkpoints.saving import save_adapter
from qriemann.errors import InputError
from qriemann.optim.methods import METHODS
from tests.runs import assert_same, logged, outcome, protected_trainer, uneven_rows

# 22 rows in batches of 4, two a step: 6 batches and 3 steps an epoch, the last step's second batch short.
STEPS = 7
CASES = {
    "zero start, rows grouped by length, means over several steps": {
        "options": {"start": "zero"},
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 3,
    },
    "locally optimal start": {"loi": True, "lora": {"lora_dropout": 0.3}},
    "packing": {"packing": True, "max_length": 16, "eval_packing": False, "num_train_epochs": 9},
    "dropout and an evaluation at the end of each epoch": {"lora": {"lora_dropout": 0.3}, "eval_strategy": "epoch"},
    "batches unaccumulated, a sampler without a seed": {
        "gradient_accumulation_steps": 1,
        "max_steps": 9,
        "accelerator_config": {"use_seedable_sampler": False},
    },
    "recomputed activations, a trained head": {
        "activation_checkpointing": True,
        "lora": {"lora_dropout": 0.3, "modules_to_save": ["lm_head"]},
    },
}


# The default ones are around an epoch's end.
@pytest.mark.parametrize("steps", [(3, 4), pytest.param((1, 2, 5, 6), marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*packing.*:UserWarning", "ignore:.*attention implementation.*:UserWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, case, steps):
    settings = {"max_steps": STEPS, **case}
    whole, _ = protected_trainer(tmp_path / "whole", **settings)
    whole.train()
    expected = outcome(whole)
    for step in steps:
        resumed, _ = protected_trainer(tmp_path / f"resumed-{step}", **settings, save_strategy="no")
        torch.randn(7)  # whatever the process drew before
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), expected)
        assert logged(resumed) == logged(whole)


STARTS = {"zero": {"options": {"start": "zero"}}, "offset": {"options": {"start": "offset"}}, "loi": {"loi": True}}
MATRIX = {
    f"{name} {start}": {"method": name, **changes}
    for name, method in METHODS.items()
    for start, changes in (STARTS if method.on_manifold else {"": {}}).items()
}
# Four steps an epoch, the last of one batch.
PACKED = {"packing": True, "max_length": 16, "eval_packing": False, "per_device_train_batch_size": 1}


class KilledError(Exception):
    """Ends a run between two batches of a step."""


class KillWithin(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*packing.*:UserWarning", "ignore:.*attention implementation.*:UserWarning")
@pytest.mark.parametrize("packing", [{}, PACKED], ids=["", "packed"])
@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX.keys())
def test_wherever_a_run_of_any_method_is_interrupted_it_ends_where_the_whole_one_does(tmp_path, case, packing):
    settings = {"max_steps": STEPS, "num_train_epochs": 9, "lora": {"lora_dropout": 0.2}, **case, **packing}
    whole, _ = protected_trainer(tmp_path / "whole", **settings)
    whole.train()
    epoch = math.ceil(len(whole.get_train_dataloader()) / 2)
    assert 2 < epoch < STEPS - 1
    for step in (epoch - 1, epoch, epoch + 1):
        resumed, _ = protected_trainer(tmp_path / f"resumed-{step}", **settings, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), outcome(whole))
    killed, _ = protected_trainer(tmp_path / "killed", **settings)
    killed.add_callback(KillWithin(2))
    with pytest.raises(KilledError):
        killed.train()
    resumed, _ = protected_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), outcome(whole))
    assert logged(resumed) == logged(whole)


class DrawingCollator:
    """Leaves tokens out of the loss by numbers from each of the three generators."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        batch = self.collate(rows)
        shape = batch["labels"].shape
        left_out = torch.rand(shape) + torch.from_numpy(np.random.random(shape)) < 2 * random.random()
        # Every row keeps a token to train on.
        left_out[:, 1] = False
        batch["labels"] = batch["labels"].masked_fill(left_out, -100)
        return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_collator_draws_is_drawn_again(tmp_path, workers):
    def drawing(folder, **settings):
        trainer, _ = protected_trainer(folder, max_steps=5, dataloader_num_workers=workers, **settings)
        trainer.data_collator = DrawingCollator(trainer.data_collator)
        return trainer

    whole = drawing(tmp_path / "whole")
    whole.train()
    for step in (1, 4):
        resumed = drawing(tmp_path / f"resumed-{step}", save_strategy="no")
        torch.randn(7), np.random.random(3), random.random()  # whatever the process drew before
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), outcome(whole))
        assert logged(resumed) == logged(whole)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The folder of a run of four steps, and everything that it ended in."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, _ = protected_trainer(folder, max_steps=4)
    trainer.train()
    return folder, outcome(trainer)


@pytest.fixture
def run(four_steps, tmp_path):
    return shutil.copytree(four_steps[0], tmp_path / "run")


def test_a_stock_trainers_own_choice_passes_over_a_save_that_broke_off(run, four_steps):
    lines = []
    (run / "checkpoint-4" / "manifest.json").unlink()
    os.truncate(run / "checkpoint-4" / "optimizer.pt", 1000)
    again, _ = protected_trainer(run, max_steps=4, protection={"note": lines.append})
    again.train(resume_from_checkpoint=True)
    assert [line.partition(": ")[0] for line in lines] == ["passed over checkpoint-4"]
    assert_same(outcome(again), four_steps[1])


def test_a_stock_trainer_without_a_whole_checkpoint_is_told_in_one_line(run):
    for path in run.glob("*/optimizer.pt"):
        os.truncate(path, 1000)
    again, _ = protected_trainer(run, max_steps=4)
    with pytest.raises(InputError, match=r"checkpoint-1: optimizer.pt has 1000 bytes") as caught:
        again.train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)


def test_resuming_a_finished_run_from_its_newest_checkpoint_changes_nothing(run, four_steps):
    again, _ = protected_trainer(run, max_steps=4)
    again.train(resume_from_checkpoint=str(qriemann.newest_checkpoint(run).path))
    assert_same(outcome(again), four_steps[1])
    assert again.state.global_step == 4
    assert not (run / "checkpoint-5").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_whoever_may_read_the_other_files_may_read_the_weights(tmp_path):
    before = os.umask(0o027)
    try:
        trainer, _ = protected_trainer(tmp_path / "run", max_steps=1)
        trainer.train()
        save_adapter(trainer, tmp_path / "run")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"run", "checkpoint-1"}
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: 0o640 for path in files}


CHANGES = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    "seed": {"seed": 3},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 1},
    "learning_rate": {"learning_rate": 0.5},
    "lora_dropout": {"lora": {"lora_dropout": 0.5}},
    "data": {"rows": uneven_rows(21)},
    "optimizer_momentum": {"options": {"momentum": 0.5}},
}


def test_what_changed_under_a_stock_trainer_is_named_and_can_be_allowed(run):
    checkpoint = str(run / "checkpoint-3")
    for name, change in CHANGES.items():
        changed, _ = protected_trainer(run, **{"max_steps": 4, **change})
        with pytest.raises(InputError, match=rf"protect's allow the names {name} if you mean it"):
            changed.train(resume_from_checkpoint=checkpoint)
    allowed, _ = protected_trainer(run, max_steps=4, seed=3, protection={"allow": ["seed"]})
    allowed.train(resume_from_checkpoint=checkpoint)
    assert allowed.state.global_step == 4


def rates(trainer):
    return [rate for _, rate in logged(trainer, "learning_rate")]


def test_a_run_that_is_extended_decays_over_its_new_length(run):
    longer, _ = protected_trainer(run, max_steps=8, save_steps=5, protection={"allow": ["max_steps"]})
    longer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    # Linear to 0 over eight steps, from the rate that the first step had; the log has each step's own.
    whole = rates(longer)[0]
    assert rates(longer)[4:] == pytest.approx([whole * (8 - taken) / 8 for taken in range(4, 8)], rel=1e-12)
    # Intervals are the settings' too: the checkpoint's save every step.
    assert (run / "checkpoint-5").exists()
    assert not (run / "checkpoint-6").exists()


@pytest.mark.parametrize(
    ("method", "options", "allowed"),
    [
        ("riemannion", {"lr": 1e-3, "momentum": 0.5, "weight_decay": 0.1}, ["lr", "momentum", "weight_decay"]),
        ("scaled-adamw", {"lr": 1e-4, "betas": (0.5, 0.9), "damping": 1e-3}, ["lr", "betas", "damping"]),
        ("adamw", {"lr": 1e-4, "lora_plus_ratio": 4.0}, ["lr", "lora_plus_ratio"]),
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_an_option_that_was_allowed_to_change_takes_effect(tmp_path, method, options, allowed, schedule):
    settings = {"lr_scheduler_type": schedule, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    first, _ = protected_trainer(tmp_path, method=method, **settings)
    first.train()
    allow = [f"optimizer_{name}" for name in allowed]
    changed, _ = protected_trainer(tmp_path, method=method, options=options, protection={"allow": allow}, **settings)
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    group = changed.optimizer.param_groups[0]
    assert {name: group[name] for name in allowed if name != "lr"} == {n: options[n] for n in allowed if n != "lr"}
    # Of the linear schedule, half is left after two of four steps.
    left = [0.5, 0.25] if schedule == "linear" else [1.0, 1.0]
    assert rates(changed)[2:] == pytest.approx([options["lr"] * share for share in left], rel=1e-12)


@pytest.mark.parametrize(("method", "key"), [("riemannion", "momentum"), ("adamw", "exp_avg"), ("muon", "factor")])
def test_an_optimizer_state_of_another_shape_is_one_line(tmp_path, method, key):
    trainer, _ = protected_trainer(tmp_path, method=method, max_steps=1)
    trainer.train()
    path = tmp_path / "checkpoint-1" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    entry = next(entry for entry in state["state"].values() if key in entry)
    entry[key] = torch.zeros(2, 2)
    torch.save(state, path)
    again, _ = protected_trainer(tmp_path, method=method, max_steps=2, protection={"allow": ["max_steps"]})
    with pytest.raises(InputError, match=rf"{key} of shape \(2, 2\) for one of shape") as caught:
        again.train(resume_from_checkpoint=str(path.parent))
    assert "\n" not in str(caught.value)


def test_another_number_of_processes_is_named(tmp_path):
    now = {"settings": {}, "processes": 1, "data": "a", "base": "b", "base_floats": "c", "base_config": {}}
    (tmp_path / "checkpoint-1").mkdir()
    commit(tmp_path / "checkpoint-1", 1, {**now, "processes": 2})
    with pytest.raises(InputError, match="got 1 processes instead of 2"):
        check_same_run(tmp_path / "checkpoint-1", now, [])
    check_same_run(tmp_path / "checkpoint-1", now, ["processes"])


def test_skipping_no_rows_is_refused_because_resume_would_see_others(tmp_path):
    with pytest.raises(InputError, match="ignore_data_skip must be false"):
        protected_trainer(tmp_path, ignore_data_skip=True)
