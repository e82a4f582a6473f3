"""The learning rate of a run that names none: that of the number of adapted matrices, whoever makes the optimizer."""

from __future__ import annotations

import json
import math

import pytest

import qriemann
from qriemann.optim.methods import METHODS
from tests.models import tiny_llama, with_lora
from tests.recipe_fixtures import train_on


@pytest.fixture
def settings(settings):
    return {**settings, "per_device_train_batch_size": 2, "save_strategy": "no", "eval_size": 0, "use_cpu": True}


RATE = 0.15


def rate_of(result) -> float:
    return result.trainer.optimizer.param_groups[0]["initial_lr"]


def matrices_of(model) -> int:
    return sum("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 9},
        {"lora_target_modules": ["q_proj", "v_proj"]},
        {"lora_target_modules": r".*layers\.0\..*_proj"},
        {"start": "zero"},
        {"method": "lora-tsd"},
    ],
    ids=str,
)
def test_the_rate_falls_with_the_root_of_the_number_of_adapted_matrices(settings, tmp_path, changes):
    result = train_on({"max_steps": 2, **settings, **changes})
    matrices = matrices_of(result.trainer.model)
    assert rate_of(result) == pytest.approx(RATE / math.sqrt(matrices), rel=0.05)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["learning_rate"] == rate_of(result)


def test_a_class_and_for_trainer_take_the_rate_that_a_recipe_takes():
    rates = []
    for make in (
        lambda model: qriemann.Riemannion(model),
        lambda model: qriemann.for_trainer()[0]()(model, **qriemann.for_trainer()[1]),
        lambda model: qriemann.Riemannion(parameters_of(model)),
    ):
        optimizer = make(with_lora(tiny_llama(layers=2)))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [pytest.approx(RATE / math.sqrt(14), rel=0.05)] * 3


def parameters_of(model):
    qriemann.attach(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_the_line_says_what_was_chosen_and_why(settings, capsys):
    result = train_on({**settings, "max_steps": 2, "display": "plain"})
    line = (
        f"learning_rate {rate_of(result):g}, the default of riemannion for {matrices_of(result.trainer.model)} adapted"
    )
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("given", [{"learning_rate": 3e-3}, {"method_kwargs": {"lr": 3e-3}}])
def test_a_rate_that_was_given_stays(settings, given, capsys):
    result = train_on({**settings, "max_steps": 2, "display": "plain", **given})
    assert rate_of(result) == 3e-3
    assert "learning_rate" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["adamw", "muon", "riemannlora"])
def test_the_default_of_another_method_is_the_tables(settings, method):
    result = train_on({**settings, "max_steps": 2, "method": method})
    assert rate_of(result) == METHODS[method].defaults["lr"].value
