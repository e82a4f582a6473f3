"""Interrupted and resumed is uninterrupted, bit for bit: parameters, optimizer state, rates, reported losses."""

from __future__ import annotations

import pytest
import torch
from transformers.trainer_pt_utils import safe_globals

import qriemann
from qriemann.training.methods import METHODS
from tests.training.runs import assert_same, logged, outcome, protected_trainer

# 22 rows in batches of 4, two a step: 6 batches and 3 steps an epoch, the last step's second batch short.
STEPS = 7
CASES = {
    "zero start, means over several steps": {"options": {"start": "zero"}, "logging_steps": 3},
    "locally optimal start": {"loi": True, "lora": {"lora_dropout": 0.3}},
    "packing": {"packing": True, "max_length": 16, "eval_packing": False, "num_train_epochs": 9},
    "dropout and an evaluation at the end of each epoch": {"lora": {"lora_dropout": 0.3}, "eval_strategy": "epoch"},
    "rows grouped by length": {"train_sampling_strategy": "group_by_length"},
    "a sampler without a seed": {"accelerator_config": {"use_seedable_sampler": False}},
    "batches unaccumulated": {"gradient_accumulation_steps": 1, "max_steps": 9},
    "recomputed activations": {"activation_checkpointing": True, "lora": {"lora_dropout": 0.3}},
    "a trained head": {"lora": {"modules_to_save": ["lm_head"]}},
}


@pytest.mark.filterwarnings("ignore:.*packing.*:UserWarning", "ignore:.*attention implementation.*:UserWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_run_resumed_around_an_epochs_end_ends_where_the_whole_one_does(tmp_path, case):
    check_resume(tmp_path, case, [3, 4])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*packing.*:UserWarning", "ignore:.*attention implementation.*:UserWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_run_resumed_at_any_step_ends_where_the_whole_one_does(tmp_path, case):
    check_resume(tmp_path, case, range(1, STEPS))


def check_resume(tmp_path, case, steps):
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


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_exactly(tmp_path, method):
    settings = {"method": method, "max_steps": 4, "lora": {"lora_dropout": 0.2}}
    whole, _ = protected_trainer(tmp_path / "whole", save_steps=2, **settings)
    whole.train()
    resumed, _ = protected_trainer(tmp_path / "resumed", save_strategy="no", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(outcome(resumed), outcome(whole))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole, _ = protected_trainer(tmp_path, max_steps=4)
    whole.train()
    again, _ = protected_trainer(tmp_path, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(outcome(again), outcome(whole))
    assert again.state.global_step == 4
    assert not (tmp_path / "checkpoint-5").exists()


def test_every_file_of_a_checkpoint_loads_without_running_code(tmp_path):
    trainer, _ = protected_trainer(tmp_path, max_steps=1)
    trainer.train()
    pickled = {path.name for path in (tmp_path / "checkpoint-1").iterdir() if path.suffix in (".pt", ".pth")}
    assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name in pickled:
        # The trainer's own list of NumPy's harmless types, which a generator's state is made of.
        with safe_globals():
            assert torch.load(tmp_path / "checkpoint-1" / name, weights_only=True)


def test_the_newest_checkpoint_is_what_a_stock_trainer_is_given(tmp_path):
    trainer, _ = protected_trainer(tmp_path, max_steps=3, save_total_limit=2)
    trainer.train()
    again, _ = protected_trainer(tmp_path, max_steps=3)
    found = qriemann.newest_checkpoint(tmp_path)
    again.train(resume_from_checkpoint=str(found.path))
    assert found.path.name == "checkpoint-3"
    assert_same(outcome(again), outcome(trainer))
    assert not (tmp_path / "checkpoint-1").exists()
