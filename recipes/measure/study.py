"""Runs a plan: every method at its best learning rate on several seeds, on the same rows in the same order.

A plan names tasks, arms (a method with its start, scaling, rank) and learning rates. Every arm tries the same number of
rates, each on its own scale, on the first seed, and further ones as long as the best lies at an edge. The rate with the
lowest validation loss then runs on every seed, and only those runs see the test rows. Each run is a process of its own; it
resumes from its last checkpoint after an interruption and leaves one line in `runs.jsonl`, whose runs are never repeated.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import study_run
from report import best_rate, read_runs, write_report
from study_run import Job

from qriemann.errors import InputError

# A process told to stop finishes its step and saves; this is enough for both.
_GRACE_S = 120


@dataclass(frozen=True)
class Plan:
    """The content of a plan file.

    Attributes:
        base: any model that `load_base` takes.
        rank: of every run; several make an arm of each ("muon-r8", "muon-r64").
        steps, batch: of every run, unless an arm overrides them.
        seeds: the first one chooses the learning rates.
        tasks: by name; the files `train` and `test`, or `reasoning_gym` (the dataset and its options) with the `system`
            prompt and `after`, the text that ends the question's introduction.
        arms: by name; `lrs` in ascending order, and any key of a recipe.
        widen: at most so many learning rates are added beyond an edge, at the ratio of the last two.
        settings: keys of a recipe for every arm.
        validation_rows, test_rows: rows held out of the training rows, and rows of the test set.
    """

    base: str
    tasks: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    rank: int | list[int] = 8
    steps: int = 60
    batch: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    widen: int = 2
    validation_rows: int = 64
    test_rows: int = 100
    settings: dict[str, Any] = field(default_factory=dict)


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        InputError: it cannot be read, or a key of it is unknown, missing or wrong.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        plan = Plan(**content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file: {error}") from error
    except TypeError as error:
        known = ", ".join(item.name for item in fields(Plan))
        raise InputError(
            f"{path}: {str(error).replace('Plan.__init__() ', '')}; the keys of a plan are {known}"
        ) from error
    if not (plan.tasks and plan.arms and plan.seeds):
        raise InputError(f"{path}: tasks, arms and seeds need an entry each")
    for name, arm in plan.arms.items():
        rates = arm.get("lrs") or []
        if not rates or list(rates) != sorted(set(rates)) or rates[0] <= 0:
            raise InputError(f"{path}: lrs of {name} must be ascending numbers above 0, got {rates!r}")
    counts = {len(arm["lrs"]) for arm in plan.arms.values()}
    if len(counts) > 1:
        raise InputError(f"{path}: every arm must have the same number of learning rates, got {sorted(counts)}")
    if isinstance(plan.rank, list):
        content["arms"] = {
            f"{name}-r{rank}": {**arm, "lora_r": rank} for rank in plan.rank for name, arm in plan.arms.items()
        }
    return Plan(**content)


def next_jobs(plan: Plan, done: list[dict[str, Any]]) -> list[Job]:
    """Every run that the plan asks for now and `done` lacks; an empty list is the end of the study."""
    finished = {run["key"] for run in done}
    jobs: list[Job] = []
    for task in plan.tasks:
        for arm in plan.arms:
            wanted = [_job(plan, task, arm, rate, plan.seeds[0], test=False) for rate in _rates(plan, task, arm, done)]
            missing = [job for job in wanted if job.key not in finished]
            if not missing:
                rate = best_rate([run for run in done if run["key"] in {job.key for job in wanted}])
                wanted = [_job(plan, task, arm, rate, seed, test=True) for seed in plan.seeds]
                missing = [job for job in wanted if job.key not in finished]
            jobs += missing
    return jobs


def _rates(plan: Plan, task: str, arm: str, done: list[dict[str, Any]]) -> list[float]:
    """The arm's learning rates, with those beyond an edge that turned out best."""
    rates = [float(rate) for rate in plan.arms[arm]["lrs"]]
    for _ in range(plan.widen):
        keys = {_job(plan, task, arm, rate, plan.seeds[0], test=False).key for rate in rates}
        runs = [run for run in done if run["key"] in keys]
        if len(runs) < len(rates) or len(rates) < 2:
            break
        best = best_rate(runs)
        if best == rates[-1]:
            rates.append(float(f"{rates[-1] * rates[-1] / rates[-2]:.3g}"))
        elif best == rates[0]:
            rates.insert(0, float(f"{rates[0] * rates[0] / rates[1]:.3g}"))
        else:
            break
    return rates


def _job(plan: Plan, task: str, arm: str, lr: float, seed: int, *, test: bool) -> Job:
    own = {key: value for key, value in plan.arms[arm].items() if key != "lrs"}
    rank = own.get("lora_r", plan.rank)
    values = {
        "model_name_or_path": plan.base,
        "lora_r": rank,
        "lora_alpha": rank,
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.batch,
        "per_device_eval_batch_size": 32,
        "eval_steps": max(plan.steps // 5, 1),
        "logging_steps": 1,
        "save_steps": max(plan.steps // 3, 1),
        "save_total_limit": 1,
        "display": "plain",
        **plan.settings,
        **own,
        "learning_rate": lr,
        "seed": seed,
    }
    return Job(task, arm, lr, seed, test, values, plan.tasks[task], plan.base, plan.validation_rows, plan.test_rows)


def run_plan(plan: Plan, results: Path, *, jobs: int, threads: int, minutes: float | None) -> bool:
    """Runs what is missing, `jobs` at a time; returns whether the study is complete."""
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    running: dict[Job, subprocess.Popen[bytes]] = {}
    failed: set[Job] = set()
    try:
        while True:
            missing = next_jobs(plan, read_runs(results))
            todo = [job for job in missing if job.key not in {other.key for other in [*running, *failed]}]
            if time.monotonic() >= deadline or not (todo or running):
                break
            for job in todo[: jobs - len(running)]:
                print(f"starts: {job.key}", flush=True)
                running[job] = _start(job, results, threads)
            while time.monotonic() < deadline and all(process.poll() is None for process in running.values()):
                time.sleep(0.5)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    if process.returncode != 0:
                        failed.add(job)
                        print(f"failed ({process.returncode}): {job.key}; see {_log(results, job)}", flush=True)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
    if failed:
        raise InputError(f"{len(failed)} runs failed: {', '.join(sorted(job.key for job in failed)[:3])}")
    return not missing


def _start(job: Job, results: Path, threads: int) -> subprocess.Popen[bytes]:
    log = _log(results, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    defaults = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    with log.open("ab") as lines:
        return subprocess.Popen(
            [sys.executable, study_run.__file__, json.dumps(vars(job)), str(results)],
            env={**defaults, **os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=lines,
            stderr=lines,
        )


def _log(results: Path, job: Job) -> Path:
    return results / "work" / f"{job.key}.log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml", help="run what is missing, then report")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: recipes/results/NAME for study_NAME.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each run (default: all cores)")
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command continues")


def main(options: argparse.Namespace) -> int:
    # The runs end with this process, each at its next step.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = read_plan(options.plan)
    results = options.results or Path(__file__).parents[1] / "results" / options.plan.stem.rpartition("_")[2]
    results.mkdir(parents=True, exist_ok=True)
    try:
        complete = run_plan(plan, results, jobs=options.jobs, threads=options.threads, minutes=options.minutes)
    except KeyboardInterrupt:
        print("study: the same command continues", file=sys.stderr)
        raise
    if complete:
        shutil.rmtree(results / "work", ignore_errors=True)
    if read_runs(results):
        print(write_report(results))
    return 0 if complete else 3
