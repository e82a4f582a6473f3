"""Who is told about a run: the tracker that the settings name, and nobody else."""

from __future__ import annotations

import importlib.util

import pytest
from trl.trainer import base_trainer

from tests.recipe_fixtures import run_cli, train_on

TRACKERS = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio", "comet_ml": "comet-ml"}


@pytest.fixture
def settings(settings):
    return {**settings, "max_steps": 1, "eval_size": 0}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_one_line_before_the_model_is_loaded(tmp_path, settings, capsys, name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    assert run_cli(tmp_path, {**settings, "model_name_or_path": "no/model", "report_to": [name]}) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"qriemann: report_to {name} needs")
    assert f"pip install {TRACKERS[name]}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"report_to": "tensorbord"}, ["report_to must be none, all or among", "got 'tensorbord'"]),
        ({"use_liger_kernel": True}, ["use_liger_kernel", "pip install liger-kernel"]),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            ["lr_scheduler_type cosine_with_min_lr", "lr_scheduler_kwargs None: ", "min_lr"],
        ),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 9.0}}, ["polynomial", "lr_end"]),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, ["cosine", "cycles"]),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": "x"}}, ["inverse_sqrt", "'x'"]),
    ],
)
def test_what_a_library_would_say_in_a_traceback_is_one_line(tmp_path, settings, capsys, change, parts):
    assert run_cli(tmp_path, {**settings, **change}) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in parts:
        assert part in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("switch", "told"), [(None, 0), ("1", 0), ("0", 1)])
def test_trl_is_told_of_a_run_only_where_the_user_turned_it_on(settings, monkeypatch, switch, told):
    calls = []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **given: calls.append(given))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    if switch is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", switch)
    train_on(settings)
    assert len(calls) == told
