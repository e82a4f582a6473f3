"""The study: the runs that a plan asks for, the figures of the report, and one small study from end to end."""

from __future__ import annotations

import importlib
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from qriemann import InputError
from tests.recipe_fixtures import make_tokenizer, save_model

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES / "measure"))
study, one, report = (importlib.import_module(name) for name in ("study", "study_run", "report"))


def plan(**changes: Any) -> Any:
    arms = {"adamw": {"method": "adamw", "lrs": [1e-3, 2e-3]}, "ours": {"method": "riemannion", "lrs": [1e-2, 3e-2]}}
    return study.Plan(**{"base": "b", "tasks": {"sum": {"train": "a", "test": "b"}}, "arms": arms, **changes})


def finish(jobs: list[Any], loss: dict[float, float]) -> list[dict[str, Any]]:
    """Lines for these jobs, with a validation loss by learning rate."""
    return [
        {"key": job.key, "arm": job.arm, "lr": job.lr, "test": job.test, "validation_loss": loss[job.lr]}
        for job in jobs
    ]


def test_a_study_first_runs_every_rate_on_the_first_seed():
    jobs = study.next_jobs(plan(), [])
    assert [(job.arm, job.lr, job.seed, job.test) for job in jobs] == [
        ("adamw", 1e-3, 0, False),
        ("adamw", 2e-3, 0, False),
        ("ours", 1e-2, 0, False),
        ("ours", 3e-2, 0, False),
    ]


def test_the_best_rate_at_an_edge_asks_for_one_beyond_it_until_it_is_inside():
    losses = {1e-3: 0.9, 2e-3: 0.8, 4e-3: 0.7, 8e-3: 0.75, 1e-2: 1.0, 3e-2: 1.1, 3.33e-3: 1.2}
    done = finish(study.next_jobs(plan(), []), losses)
    second = study.next_jobs(plan(), done)
    assert [(job.arm, job.lr) for job in second] == [("adamw", 4e-3), ("ours", 3.33e-3)]
    done += finish(second, losses)
    third = study.next_jobs(plan(), done)
    # The best rate of ours is inside now, so it runs on every seed; adamw's is not.
    assert [(job.arm, job.lr, job.seed, job.test) for job in third] == [
        ("adamw", 8e-3, 0, False),
        *(("ours", 1e-2, seed, True) for seed in (0, 1, 2)),
    ]
    done += finish(third, losses)
    last = study.next_jobs(plan(), done)
    assert [(job.lr, job.seed, job.test) for job in last] == [(4e-3, seed, True) for seed in (0, 1, 2)]
    assert study.next_jobs(plan(), done + finish(last, losses)) == []


def test_no_more_rates_are_added_than_the_plan_allows_and_nan_never_wins():
    losses = {1e-3: 0.9, 2e-3: 0.8, 4e-3: 0.7, 1e-2: math.nan, 3e-2: 1.0}
    allowed = plan(widen=1)
    done = finish(study.next_jobs(allowed, []), losses)
    second = study.next_jobs(allowed, done)
    assert [(job.arm, job.lr) for job in second] == [("adamw", 4e-3), ("ours", 9e-2)]


def test_runs_of_changed_settings_are_run_again():
    done = finish(study.next_jobs(plan(), []), dict.fromkeys((1e-3, 2e-3, 1e-2, 3e-2), 1.0))
    assert len(study.next_jobs(plan(steps=61), done)) == 4


def test_several_ranks_make_an_arm_of_each_which_is_compared_with_adamw_of_its_rank(tmp_path):
    path = tmp_path / "plan.yaml"
    arms = {"adamw": {"method": "adamw", "lrs": [1e-3]}, "ours": {"method": "riemannion", "lrs": [1e-2]}}
    path.write_text(
        yaml.safe_dump({"base": "b", "tasks": {"t": {"train": "a", "test": "b"}}, "arms": arms, "rank": [8, 64]})
    )
    jobs = study.next_jobs(study.read_plan(path), [])
    assert [(job.arm, job.values["lora_r"]) for job in jobs] == [
        ("adamw-r8", 8), ("ours-r8", 8), ("adamw-r64", 64), ("ours-r64", 64),
    ]  # fmt: skip
    assert [report.reference_arm(job.arm) for job in jobs] == ["adamw-r8", "adamw-r8", "adamw-r64", "adamw-r64"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arms": {"a": {"lrs": [2e-3, 1e-3]}}}, "ascending"),
        ({"arms": {"a": {"lrs": [1e-3]}, "b": {"lrs": [1e-3, 2e-3]}}}, "same number"),
        ({"arms": {"a": {"method": "adamw"}}}, "ascending"),
        ({"tasks": None}, "tasks, arms and seeds need an entry each"),
        ({"stepz": 3}, "unexpected keyword argument 'stepz'; the keys of a plan are base, tasks"),
    ],
    ids=str,
)
def test_a_wrong_plan_is_refused_by_name(tmp_path, change, named):
    path = tmp_path / "plan.yaml"
    good = {"base": "b", "tasks": {"t": {"train": "a", "test": "b"}}, "arms": {"a": {"lrs": [1e-3]}}}
    path.write_text(yaml.safe_dump({**good, **change}))
    with pytest.raises(InputError, match=named):
        study.read_plan(path)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("-3", "-3", True),
        ("13", "3", False),
        ("so\n#### 72", "72", True),
        ("so\n#### 172", "72", False),
        ("the correct answer is answer2", "answer2", True),
        ("It is 7.", "7", True),
        ("7 or 8", "7", False),
    ],
)
def test_an_answer_is_right_as_the_last_word(said, answer, right):
    assert one.is_right(said, answer) is right


def test_validation_and_test_rows_are_not_trained_on():
    pytest.importorskip("reasoning_gym", reason="the extra study is not installed")
    source = {"reasoning_gym": {"name": "chain_sum", "min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}}
    parts = one.load_task(source, 100, 20, 30)
    assert [len(part) for part in parts] == [100, 20, 30]
    questions = [row["messages"][0]["content"] for part in parts for row in part]
    assert len(set(questions)) == 150


def searched(**losses: float) -> list[dict[str, Any]]:
    return [{"lr": float(rate[1:].replace("_", "-")), "validation_loss": loss} for rate, loss in losses.items()]


def test_sensitivity_is_the_ratio_of_the_rates_within_one_percent():
    # Bound 1.01: it is crossed half way from 1e-2 to 1e-1 and half way from 1e-4 to 1e-3, in the logarithm.
    runs = searched(r1e_4=1.02, r1e_3=1.0, r1e_2=1.0, r1e_1=1.02)
    assert report.sensitivity(runs) == pytest.approx(100, rel=1e-6)
    assert report.sensitivity(searched(r1e_3=1.0)) == 1.0


def test_steps_to_reach_are_interpolated_between_evaluations():
    run = {"validation": [[0, 3.0], [10, 2.0], [20, 1.0]]}
    assert report.steps_to_reach(run, 1.5) == pytest.approx(15)
    assert report.steps_to_reach(run, 3.5) == 0
    assert report.steps_to_reach(run, 0.5) is None


def test_the_paired_interval_is_students_t():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.303 for two degrees of freedom.
    mean, half = report.paired({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert report.paired({0: 1.0}, {0: 1.0}) is None


def test_the_table_has_both_ends_of_the_curve_and_the_interval_of_the_rows_that_all_seeds_share():
    def run(seed: int, right: int) -> dict:
        made = {"task": "t", "arm": "adamw", "lr": 1e-3, "seed": seed, "values": {"max_steps": 60}, "cpu_s": 9.0}
        curves = {"curve": [[n, float(n)] for n in range(1, 61)], "validation": [[0, 2.0], [60, 1.0]]}
        measured = {"validation_loss": 1.0, "peak_gib": 1.0, "machine": {"device": {"type": "cpu"}}}
        return {**made, **curves, **measured, "test": {"loss": 1.0, "right": right, "rows": 100}}

    cells = report.table([run(0, 30), run(1, 32)], "t").splitlines()[-1].split(" | ")
    # Wilson's interval of 31 in 100.
    assert cells[4] == "31% (23% to 41%)"
    assert cells[5:7] == ["10.500 ± 0.000", "50.500 ± 0.000"]


@pytest.fixture
def small_plan(tmp_path) -> Path:
    """Two arms of one learning rate, two seeds, four steps of a tiny model."""
    rows = [
        {
            "messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}],
            "answer": str(n),
        }
        for n in range(24)
    ]
    for name, part in (("train", rows[:18]), ("test", rows[18:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    content = {
        "base": str(save_model(tmp_path / "base", make_tokenizer())),
        "rank": 2,
        "steps": 4,
        "batch": 2,
        "seeds": [0, 1],
        "widen": 0,
        "validation_rows": 4,
        "test_rows": 6,
        "settings": {"use_cpu": True},
        "tasks": {"say": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}},
        "arms": {"adamw": {"method": "adamw", "lrs": [1e-3]}, "riemannion": {"method": "riemannion", "lrs": [1e-2]}},
    }
    path = tmp_path / "study_tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_every_arm_sees_the_same_rows_and_the_report_says_what_the_runs_gave(tmp_path, small_plan):
    results, plan_ = tmp_path / "results", study.read_plan(small_plan)
    results.mkdir()
    while jobs := study.next_jobs(plan_, report.read_runs(results)):
        for job in jobs:
            one.finish(one.Job(**json.loads(json.dumps(vars(job)))), results)
    runs = report.read_runs(results)
    assert len(runs) == 2 * (1 + 2)
    by_key = {(run["arm"], run["seed"], bool(run["test"])): run for run in runs}
    # The search's run and the first seed's test run are the same training.
    for arm in ("adamw", "riemannion"):
        assert by_key[arm, 0, False]["validation"] == by_key[arm, 0, True]["validation"]
        assert by_key[arm, 0, True]["validation"] != by_key[arm, 1, True]["validation"]
    # Equal tokens in the same order for every arm.
    assert by_key["adamw", 1, True]["tokens"] == by_key["riemannion", 1, True]["tokens"] > 0
    assert by_key["adamw", 1, True]["curve"][0] == pytest.approx(by_key["riemannion", 1, True]["curve"][0], rel=1e-5)
    text = report.write_report(results)
    loss = sum(by_key["riemannion", seed, True]["test"]["loss"] for seed in (0, 1)) / 2
    assert f"| riemannion | 0.01 | {loss:.3f}" in text
    assert (results / "say.png").stat().st_size > 10_000
    assert not list((results / "work").glob("*"))


def test_the_readmes_starts_are_those_of_the_committed_runs():
    runs = report.read_runs(RECIPES / "results" / "starts")
    lines = (RECIPES / "results" / "README.md").read_text().splitlines()
    tested = [run for run in runs if run["test"]]
    assert len(tested) >= 12
    for arm in {run["arm"] for run in tested}:
        group = [run for run in tested if run["arm"] == arm]
        early = [statistics.mean(loss for _, loss in run["curve"][:20]) for run in group]
        after = [run["validation_loss"] for run in group]
        cells = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in (early, after)]
        assert f"| {arm} | {group[0]['lr']:g} | {' | '.join(cells)} |" in lines


@pytest.mark.parametrize("folder", ["cpu", "words"])
def test_the_readmes_table_is_what_the_committed_runs_give(folder):
    runs = report.read_runs(RECIPES / "results" / folder)
    (task,) = {run["task"] for run in runs}
    assert report.table(runs, task) in (RECIPES / "results" / "README.md").read_text(encoding="utf-8")


def test_the_committed_runs_are_those_that_their_plan_asks_for():
    # Keys hash every setting: a renamed or dropped one would run the whole study again.
    plan_ = study.read_plan(RECIPES / "measure" / "study_starts.yaml")
    assert study.next_jobs(plan_, report.read_runs(RECIPES / "results" / "starts")) == []


def command(tmp_path: Path, small_plan: Path) -> list[str]:
    words = [sys.executable, str(RECIPES / "measure"), "study", str(small_plan), "--threads", "1"]
    return [*words, "--results", str(tmp_path / "results")]


@pytest.mark.slow
def test_the_script_runs_a_plan_to_its_end_and_runs_nothing_twice(tmp_path, small_plan):
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(tmp_path, small_plan), capture_output=True, text=True, timeout=1200, check=False)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = tmp_path / "results" / "runs.jsonl"
    assert len(lines.read_text().splitlines()) == 6
    before = lines.read_bytes()
    again = run()
    assert again.returncode == 0
    assert "starts" not in again.stdout
    assert lines.read_bytes() == before


@pytest.mark.slow(reason="starts the script and waits for its run to stop")
def test_a_terminated_study_ends_its_runs_and_says_how_to_continue(tmp_path, small_plan):
    running = subprocess.Popen(command(tmp_path, small_plan), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout.readline().startswith("starts")
    time.sleep(5)
    running.terminate()
    _, told = running.communicate(timeout=300)
    assert running.returncode == 130
    assert "study: the same command continues\n" in told
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed
