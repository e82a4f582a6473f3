"""One run of a study, in a process of its own: trains, tests, and leaves its line in `runs.jsonl`; see study.py."""

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from study_report import RUNS, read_runs

from qriemann.errors import InputError


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


def load_task(source: dict[str, Any], train_rows: int, validation_rows: int, test_rows: int) -> Iterator[list[Any]]:
    """Training, validation and test rows with `messages` and `answer`; validation is cut from the training rows."""
    if "reasoning_gym" in source:
        rows = _reasoning_gym(source, train_rows + validation_rows + test_rows)
        test, rows = rows[:test_rows], rows[test_rows:]
    else:
        rows, test = (_read_rows(source[name]) for name in ("train", "test"))
        test = test[:test_rows]
    if len(rows) < validation_rows + 1:
        raise InputError(f"a task must have more than {validation_rows} training rows, got {len(rows)}")
    yield rows[validation_rows:]
    yield rows[:validation_rows]
    yield test


def _reasoning_gym(source: dict[str, Any], wanted: int) -> list[dict[str, Any]]:
    from reasoning_gym import create_dataset

    options, system, after = dict(source["reasoning_gym"]), source.get("system"), source.get("after", "")
    rows: dict[str, dict[str, Any]] = {}
    for item in create_dataset(options.pop("name"), size=4 * wanted, seed=0, **options):
        question = item["question"].rpartition(after)[2].strip() if after else item["question"]
        turns = [{"role": "system", "content": system}] if system else []
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": item["answer"]}]
        rows.setdefault(question, {"messages": turns, "answer": item["answer"]})
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
    from qriemann.training.run import train

    from qriemann.config.settings import config_from_values
    from qriemann.folder import records
    from qriemann.folder.contents import curve, read_json

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

    from qriemann.data.formats import prepare
    from qriemann.data.sources import Source
    from qriemann.evaluation.evaluate import greedy_answers
    from qriemann.evaluation.reload import Row
    from qriemann.evaluation.rows import Rows

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


def _work(results: Path, job: Job) -> Path:
    return results / "work" / job.training


def finish(job: Job, results: Path) -> None:
    """Runs the job, adds its line, and clears up after the last use of its folder."""
    with _trained_tokens_scored_alone():
        line = json.dumps(run_job(job, results)) + "\n"
    # One write, so that lines of runs that end together do not mix.
    with (results / RUNS).open("a", encoding="utf-8") as lines:
        lines.write(line)
    if job.test:
        shutil.rmtree(_work(results, job))


if __name__ == "__main__":
    try:
        finish(Job(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    except InputError as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit("study: stopped; the same command goes on")
