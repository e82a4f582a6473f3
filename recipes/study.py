"""Which method trains better, and for how much: `python recipes/study.py --plan recipes/study_cpu.yaml`.

A plan names tasks, arms (a method with its start, scaling, rank) and learning rates. Every arm gets the same number of
learning rates on its own scale on one seed, and more beyond the edge as long as the best is there; the best by validation
loss then runs on every seed, and only those runs see the test rows. Each run is a process of its own that goes on from its
last checkpoint if it was interrupted, and leaves one line in `runs.jsonl`; what is there is not run again. `--minutes 9`
cuts the work into pieces.

`python recipes/study.py --report recipes/results/cpu` makes the tables and plots from `runs.jsonl` alone.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from study_report import RUNS, best_rate, read_runs, write_report

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
        tasks: by name; `reasoning_gym` (the dataset and its options) or the files `train` and `test`.
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


@dataclass(frozen=True)
class Job:
    """One run. `test` runs are those that the tables are made of."""

    task: str
    arm: str
    lr: float
    seed: int
    test: bool
    values: dict[str, Any]
    source: dict[str, Any]
    base: str
    validation_rows: int
    test_rows: int

    @property
    def key(self) -> str:
        """The same for the same settings, so that a changed plan runs again."""
        return f"{self.training}-{'test' if self.test else 'search'}"

    @property
    def training(self) -> str:
        """The same for a search and a test that train alike: the second takes what the first trained."""
        settings = {name: value for name, value in vars(self).items() if name != "test"}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.task}-{self.arm}-{self.lr:g}-{self.seed}-{digest}"


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


def load_task(source: dict[str, Any], train_rows: int, validation_rows: int, test_rows: int) -> Iterator[list[Any]]:
    """Training, validation and test rows with `messages` and `answer`; validation is cut from the training rows."""
    if "reasoning_gym" in source:
        options = dict(source["reasoning_gym"])
        rows = _reasoning_gym(options, train_rows + validation_rows + test_rows, source.get("system"))
        test, rows = rows[:test_rows], rows[test_rows:]
    else:
        rows, test = (_read_rows(source[name]) for name in ("train", "test"))
        test = test[:test_rows]
    if len(rows) < validation_rows + 1:
        raise InputError(f"a task must have more than {validation_rows} training rows, got {len(rows)}")
    yield rows[validation_rows:]
    yield rows[:validation_rows]
    yield test


def _reasoning_gym(options: dict[str, Any], wanted: int, system: str | None) -> list[dict[str, Any]]:
    from reasoning_gym import create_dataset

    rows: dict[str, dict[str, Any]] = {}
    for item in create_dataset(options.pop("name"), size=4 * wanted, seed=0, **options):
        turns = [{"role": "system", "content": system}] if system else []
        turns += [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
        rows.setdefault(item["question"], {"messages": turns, "answer": item["answer"]})
        if len(rows) == wanted:
            break
    return list(rows.values())


def _read_rows(path: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"a task's file must hold a JSON object a line, got {path}: {error}") from error


def is_right(said: str, answer: str) -> bool:
    """Whether a text is the answer, or ends with it after other words ("#### 72", "the correct answer is answer2")."""
    return re.search(rf"(?:^|\s){re.escape(answer)}[.\s]*$", said) is not None


def run_job(job: Job, results: Path) -> dict[str, Any]:
    """Trains, goes on from a checkpoint if there is one, and returns the run's line of `runs.jsonl`.

    A test of a rate that the search ran already ends where that run ended, and has its curve and its clock.
    """
    from datasets import Dataset

    from qriemann.publish.folder import curve, read_json
    from qriemann.training import records
    from qriemann.training.config import config_from_values
    from qriemann.training.run import train

    # Every arm sees the same rows in the same order: the trainer shuffles them by the seed.
    needed = job.values["max_steps"] * job.values["per_device_train_batch_size"]
    train_rows, validation, test = load_task(job.source, needed, job.validation_rows, job.test_rows)
    folder = _work(results, job)
    resume = any(folder.glob("checkpoint-*"))
    config = config_from_values({**job.values, "output_dir": str(folder), "resume": resume, "overwrite": not resume})
    clock = _clock()
    result = train(
        config,
        train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in train_rows]),
        eval_dataset=Dataset.from_list([{"messages": row["messages"]} for row in validation]),
        callbacks=[clock],
    )
    searched = next((run for run in read_runs(results) if run["key"] == replace(job, test=False).key), None)
    if job.test and searched is not None:
        return {**searched, "key": job.key, "test": _test(result, test)}
    history = records.read_metrics(folder)
    described = read_json(folder / records.RUN)
    run = {
        "key": job.key,
        **{key: value for key, value in vars(job).items() if key not in ("source", "base")},
        "base": job.base,
        "source": {key: value for key, value in job.source.items() if key not in ("train", "test")},
        "curve": curve(history, "loss"),
        "validation": curve(history, "eval_loss"),
        "validation_loss": result.eval_loss,
        "tokens": max((record.get("num_tokens", 0) for record in history), default=0),
        "tokens_per_s": result.tokens_per_s,
        "wall_clock_s": result.wall_clock_s,
        "cpu_s": time.process_time(),
        "optimizer_ms": clock.median_ms,
        "peak_gib": result.peak_gib,
        "resumed": resume,
        "machine": {key: described.get(key) for key in ("versions", "device")},
    }
    if job.test:
        run["test"] = _test(result, test)
    return run


@contextmanager
def _trained_tokens_scored_alone() -> Iterator[None]:
    """Without Triton, TRL 1.16 projects every position onto the vocabulary: a fifth of a step, for the same loss."""
    import trl.trainer.utils as upstream

    before = upstream._use_triton  # type: ignore[attr-defined]
    upstream._use_triton = lambda _device: True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        upstream._use_triton = before  # type: ignore[attr-defined]


def _test(result: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    from qriemann.release.evaluate import greedy_answers
    from qriemann.release.reload import Row
    from qriemann.release.rows import Rows
    from qriemann.training.data import prepare
    from qriemann.training.sources import Source

    tokenizer = result.tokenizer
    table = Source(Dataset.from_list([{"messages": row["messages"]} for row in rows]), "test")
    loss = result.trainer.evaluate(prepare(table, None, tokenizer).train, metric_key_prefix="test")["test_loss"]
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        for row in rows
    ]
    asked = [Row(ids=ids, positions=[len(ids) - 1], targets=[0]) for ids in prompts]
    result.model.eval()
    said = greedy_answers(
        result.model, tokenizer, Rows("test", asked, [row["messages"][-1]["content"] for row in rows], [])
    )
    right = [is_right(text, row["answer"]) for text, row in zip(said, rows, strict=True)]
    return {"loss": loss, "right": sum(right), "rows": len(rows)}


def _clock() -> Any:
    import statistics

    from transformers import TrainerCallback

    class OptimizerClock(TrainerCallback):
        """Times the optimizer's steps."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

        @property
        def median_ms(self) -> float | None:
            return 1e3 * statistics.median(self.seconds) if self.seconds else None

    return OptimizerClock()


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
            [sys.executable, __file__, "--job", json.dumps(vars(job)), "--results", str(results)],
            env=environment,
            stdout=lines,
            stderr=lines,
        )


def _log(results: Path, job: Job) -> Path:
    return results / "work" / f"{job.key}.log"


def _work(results: Path, job: Job) -> Path:
    return results / "work" / job.training


def _finish_job(text: str, results: Path) -> int:
    job = Job(**json.loads(text))
    with _trained_tokens_scored_alone():
        line = json.dumps(run_job(job, results)) + "\n"
    # One write, so that lines of runs that end together do not mix.
    with (results / RUNS).open("a", encoding="utf-8") as lines:
        lines.write(line)
    if job.test:
        shutil.rmtree(_work(results, job))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="study.py", description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", metavar="FILE.yaml", help="run what is missing, then report")
    what.add_argument("--report", metavar="DIR", help="tables and plots of the runs there")
    what.add_argument("--job", help=argparse.SUPPRESS)
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
    if options.job is None:
        # The runs end with this process, each at its next step.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.job is not None:
            return _finish_job(options.job, Path(options.results))
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
