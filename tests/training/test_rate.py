"""The learning rate, start and rank of a run that names none, whoever makes the optimizer."""

from __future__ import annotations

import json

import pytest

import qriemann
from qriemann.errors import InputError
from qriemann.optim.methods import METHODS
from tests.models import tiny_llama, with_lora
from tests.recipe_fixtures import train_on


@pytest.fixture
def settings(settings):
    return {**settings, "per_device_train_batch_size": 2, "save_strategy": "no", "eval_size": 0, "use_cpu": True}


def saved_config(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({}, 5e-3),
        ({"max_steps": 9}, 5e-3),
        ({"method": "lora-tsd"}, 5e-3),
        ({"learning_rate": 3e-3}, 3e-3),
        ({"method_kwargs": {"lr": 3e-3}}, 3e-3),
        *(({"method": name}, METHODS[name].defaults["lr"].value) for name in ("adamw", "muon", "riemannlora")),
    ],
    ids=str,
)
def test_the_rate_is_the_given_one_or_the_methods_default_at_any_length(settings, tmp_path, changes, rate):
    result = train_on({**settings, "max_steps": 2, **changes})
    assert result.trainer.optimizer.param_groups[0]["initial_lr"] == rate
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["learning_rate"] == rate


def test_a_class_and_for_trainer_take_the_rate_and_the_start_that_a_recipe_takes():
    factory, options = qriemann.for_trainer()
    for make in (qriemann.Riemannion, lambda model: factory()(model, **options)):
        optimizer = make(with_lora(tiny_llama(layers=1)))
        assert optimizer.param_groups[0]["lr"] == 5e-3
        assert all(point.offset is None and not point.s.any() for point in optimizer.points)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start": "offset"},
        {"init": "loi", "init_kwargs": {"batches": 2}},
        {"start": "offset", "init": "loi", "init_kwargs": {"batches": 2}},
        {"start": "offset", "lora_alpha": 12},
        {"start": "offset", "lora_alpha": 5},
        {"start": "offset", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k_proj": 6}},
        {"method": "adamw"},
    ],
    ids=str,
)
def test_lora_r_is_the_rank_of_what_is_saved(settings, tmp_path, changes):
    train_on({**settings, "max_steps": 2, "lora_r": 8, **changes})
    saved = saved_config(tmp_path)
    assert (saved["r"], saved["lora_alpha"]) == (8, changes.get("lora_alpha", 8))
    assert saved["rank_pattern"] == changes.get("rank_pattern", {})
    assert saved["alpha_pattern"] == changes.get("alpha_pattern", {})


def test_an_offset_needs_an_even_rank(settings):
    with pytest.raises(InputError, match=r"lora_r must be even with start: offset, .* got 5"):
        train_on({**settings, "max_steps": 2, "lora_r": 5, "start": "offset"})
