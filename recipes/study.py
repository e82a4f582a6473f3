"""Which method trains better, and for how much: `python recipes/study.py --plan recipes/study_cpu.yaml`.

A plan names tasks, arms (a method with its start, scaling, rank) and learning rates. Every arm gets the same number of
learning rates on its own scale on one seed, and more beyond the edge as long as the best is there; the best by validation
loss then runs on every seed, and only those runs see the test rows. Each run is a process of its own that goes on from its
last checkpoint if it was interrupted, and leaves one line in `runs.jsonl`; what is there is not run again. `--minutes 9`
cuts the work into pieces.

`python recipes/study.py --report recipes/results/cpu` makes the tables and plots from `runs.jsonl` alone.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import study_run
from study_report import best_rate, read_runs, write_report
from study_run import Job

from qriemann.errors import InputError

# A process that is told to stop finishes its step and saves; this long is enough for both.
_GRACE_S = 120


@dataclass(frozen=True)
class Plan:
    """What a plan file says.

    Attributes:
        base: what `load_base` takes.
        rank: of every run; several make an arm of each ("muon-r8", "muon-r64").
        steps, batch: of every run, unless an arm says otherwise.
        seeds: the first one chooses the learning rates.
        tasks: by name; the files `train` and `test`, or `reasoning_gym` (the dataset and its options) with the `system`
            prompt and the text `after` which a question begins, if it has an introduction of its own.
        arms: by name; `lrs` in ascending order, and any key of a recipe.
        widen: learning rates added beyond an edge, at most, of the same ratio as the last two.
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


def read_plan(path: str | Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        InputError: it cannot be read, or a key of it is unknown or missing.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"the plan must be a readable YAML file, got {path}: {error}") from error
    known = {item.name for item in fields(Plan)}
    if not isinstance(content, dict) or not content.keys() <= known:
        odd = sorted(map(str, content.keys() - known)) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"a plan must have keys of {', '.join(sorted(known))}, got {odd} in {path}")
    for key in ("base", "tasks", "arms"):
        if not content.get(key):
            raise InputError(f"a plan must have {key}, got none in {path}")
    for name, arm in content["arms"].items():
        rates = arm.get("lrs") if isinstance(arm, dict) else None
        if not rates or list(rates) != sorted(set(rates)) or rates[0] <= 0:
            raise InputError(f"lrs of an arm must be ascending numbers above 0, got {rates!r} for {name} in {path}")
    counts = {len(arm["lrs"]) for arm in content["arms"].values()}
    if len(counts) > 1:
        raise InputError(f"every arm must get the same number of learning rates, got {sorted(counts)} in {path}")
    ranks = content.get("rank", Plan.rank)
    if isinstance(ranks, list):
        content["arms"] = {
            f"{name}-r{rank}": {**arm, "lora_r": rank} for rank in ranks for name, arm in content["arms"].items()
        }
    plan = Plan(**{**content, "seeds": tuple(content.get("seeds", Plan.seeds))})
    if not plan.seeds:
        raise InputError(f"seeds must name at least one, got none in {path}")
    return plan


def next_jobs(plan: Plan, done: list[dict[str, Any]]) -> list[Job]:
    """Every run that the plan asks for now and that `done` does not hold; an empty list is the end of the study."""
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


def run_plan(plan: Plan, results: Path, *, jobs: int, threads: int, minutes: float | None, console: Any) -> bool:
    """Runs what is missing, `jobs` at a time; returns whether the study is complete."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    running: dict[subprocess.Popen[bytes], Job] = {}
    failed: set[str] = set()
    try:
        while True:
            busy = {job.key for job in running.values()}
            missing = next_jobs(plan, read_runs(results))
            todo = [job for job in missing if job.key not in busy | failed]
            late = deadline is not None and time.monotonic() >= deadline
            if late or (not todo and not running):
                break
            while todo and len(running) < jobs:
                job = todo.pop(0)
                console.print(f"starts: {job.key}", highlight=False)
                running[_start(job, results, threads)] = job
            ended: list[subprocess.Popen[bytes]] = []
            while not ended and (deadline is None or time.monotonic() < deadline):
                time.sleep(0.5)
                ended = [process for process in running if process.poll() is not None]
            for process in ended:
                job = running.pop(process)
                if process.returncode != 0:
                    failed.add(job.key)
                    console.print(
                        f"failed ({process.returncode}): {job.key}; see {_log(results, job)}", highlight=False
                    )
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
    if failed:
        raise InputError(f"every run must end well, got {len(failed)} that failed: {', '.join(sorted(failed)[:3])}")
    return not missing


def _start(job: Job, results: Path, threads: int) -> subprocess.Popen[bytes]:
    log = _log(results, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TQDM_DISABLE": "1",
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
    }
    with log.open("ab") as lines:
        return subprocess.Popen(
            [sys.executable, study_run.__file__, json.dumps(vars(job)), str(results)],
            env=environment,
            stdout=lines,
            stderr=lines,
        )


def _log(results: Path, job: Job) -> Path:
    return results / "work" / f"{job.key}.log"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="study.py", description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", metavar="FILE.yaml", help="run what is missing, then report")
    what.add_argument("--report", metavar="DIR", help="tables and plots of the runs there")
    parser.add_argument(
        "--results", metavar="DIR", help="default: results/NAME beside the plan, NAME its name's last part"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each run (default: all cores)")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 for a complete study or report, 3 an incomplete one, 130 a stopped one, 2 for what to mend."""
    from rich.console import Console

    options, console = parse(arguments), Console()
    # The runs end with this process, each at its next step.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.report is not None:
            console.print(write_report(Path(options.report)), highlight=False, markup=False, soft_wrap=True)
            return 0
        path = Path(options.plan)
        plan = read_plan(path)
        results = Path(options.results or path.parent / "results" / path.stem.rpartition("_")[2])
        results.mkdir(parents=True, exist_ok=True)
        complete = run_plan(
            plan, results, jobs=options.jobs, threads=options.threads, minutes=options.minutes, console=console
        )
        if complete:
            shutil.rmtree(results / "work", ignore_errors=True)
        if read_runs(results):
            console.print(write_report(results), highlight=False, markup=False, soft_wrap=True)
        return 0 if complete else 3
    except InputError as error:
        print(f"study: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
