"""The best model is the best of all evaluations, wherever the saves fall."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.recipe_fixtures import run_cli, train_on
from tests.runs import protected_trainer

# By this rule the best is the first evaluation of a loss that falls: a step at which nothing else is saved.
WORST = {"metric_for_best_model": "loss", "greater_is_better": True}


def best_trainer(folder, **changes):
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 6, "learning_rate": 1e-3}
    return protected_trainer(folder, **{**settings, "load_best_model_at_end": True, **WORST, **changes})[0]


@pytest.mark.parametrize("change", [{}, {"eval_steps": 0.2, "save_steps": 0.6}, {"save_total_limit": 1}])
def test_the_best_evaluation_is_kept_where_no_save_is_due(tmp_path, change):
    trainer = best_trainer(tmp_path, **change)
    trainer.train()
    losses = {record["step"]: record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record}
    best = max(losses, key=losses.__getitem__)
    assert best == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[2], rel=1e-6)


def test_a_folder_that_was_moved_keeps_its_best_and_one_that_lost_it_says_so(tmp_path):
    best_trainer(tmp_path / "run", max_steps=4, save_steps=4).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "checkpoint-2")
    kept, lines = {}, []
    for name in ("moved", "lost"):
        protection = {"allow": ["max_steps", "save_steps"], "note": lines.append}
        trainer = best_trainer(tmp_path / name, protection=protection)
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-4"))
        kept[name] = trainer.state.best_model_checkpoint
    assert kept["moved"] == str(tmp_path / "moved" / "checkpoint-2")
    assert kept["lost"] == str(tmp_path / "lost" / "checkpoint-6")
    assert len(lines) == 1
    assert "step 2, is gone" in lines[0]


def test_load_best_model_at_end_alone_saves_what_it_evaluates_and_the_run_says_what_it_kept(tmp_path, settings):
    values = {**settings, "max_steps": 4, "eval_steps": 1, "eval_size": 4, "load_best_model_at_end": True, **WORST}
    result = train_on({**values, "per_device_train_batch_size": 4, "learning_rate": 1e-2})
    assert result.kept_step == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["result"]["kept_step"] == 1
    logged = {
        record["step"]: record["eval_loss"] for record in result.trainer.state.log_history if "eval_loss" in record
    }
    assert result.eval_loss == pytest.approx(logged[1], rel=1e-6)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in range(1, 5)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy best"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type reduce_lr_on_plateau"),
    ],
)
def test_a_setting_that_goes_by_held_out_rows_is_named_where_there_are_none(tmp_path, settings, capsys, change, named):
    assert run_cli(tmp_path, {**settings, "display": "plain", "max_steps": 1, "eval_size": 0, **change}) == 0
    assert f"{named} has no effect without held-out rows, and the last step is kept" in capsys.readouterr().out


@pytest.mark.parametrize("metric", ["accuracy", "eval_bleu"])
def test_a_metric_that_nothing_measures_is_refused(tmp_path, settings, capsys, metric):
    assert run_cli(tmp_path, {**settings, "metric_for_best_model": metric}) == 2
    assert f"loss, entropy, mean_token_accuracy, got '{metric}'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
