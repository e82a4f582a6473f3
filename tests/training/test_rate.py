"""The learning rate of a recipe that names none: fitted to the number of steps, where the method's rate depends on it."""

from __future__ import annotations

import json

import pytest

from qriemann.optim.methods import METHODS
from tests.recipe_fixtures import train_on


@pytest.fixture
def settings(settings):
    return {**settings, "per_device_train_batch_size": 2, "save_strategy": "no", "eval_size": 0, "use_cpu": True}


def rate_of(result) -> float:
    return result.trainer.optimizer.param_groups[0]["initial_lr"]


@pytest.mark.parametrize(
    ("changes", "steps", "rate"),
    [
        ({"max_steps": 40}, 40, 0.015),
        # 24 rows, 4 a step: 6 steps an epoch.
        ({"num_train_epochs": 7, "gradient_accumulation_steps": 2}, 42, 0.014),
        # 22 rows left, 4 a step: a step of two rows ends each epoch.
        ({"num_train_epochs": 6, "gradient_accumulation_steps": 2, "max_train_rows": 22}, 36, 0.017),
        ({"max_steps": 40, "start": "zero"}, 40, 0.005),
        ({"max_steps": 40, "method": "lora-tsd"}, 40, 0.015),
        ({"max_steps": 3}, 3, 0.02),
    ],
)
def test_the_rate_times_the_steps_that_the_trainer_takes_is_the_default(settings, tmp_path, changes, steps, rate):
    result = train_on({**settings, **changes})
    assert result.steps == steps
    assert rate_of(result) == rate
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["learning_rate"] == rate


def test_packed_rows_are_counted_by_their_tokens(settings):
    packed = {"packing": True, "max_length": 128, "num_train_epochs": 8, "per_device_train_batch_size": 1}
    result = train_on({**settings, **packed})
    assert rate_of(result) == pytest.approx(0.6 / result.steps, rel=0.25)
    assert result.steps < 24 * 8


def test_gradient_bases_take_a_third(settings):
    result = train_on({**settings, "max_steps": 40, "init": "loi", "init_kwargs": {"batches": 2}})
    assert rate_of(result) == 0.005


def test_the_line_says_what_was_chosen_and_why(settings, capsys):
    train_on({**settings, "max_steps": 2, "display": "plain"})
    assert "learning_rate 0.02, the default of riemannion for 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("given", [{"learning_rate": 3e-3}, {"method_kwargs": {"lr": 3e-3}}])
def test_a_rate_that_was_given_stays(settings, given, capsys):
    result = train_on({**settings, "max_steps": 2, "display": "plain", **given})
    assert rate_of(result) == 3e-3
    assert "learning_rate" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["adamw", "muon", "riemannlora"])
def test_the_default_of_another_method_is_the_tables(settings, method):
    result = train_on({**settings, "max_steps": 2, "method": method})
    assert rate_of(result) == METHODS[method].defaults["lr"].value
