"""One run of a study, in a process of its own: trains, tests, and adds its line to `runs.jsonl`; study.py starts it."""

import hashlib
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from report import RUNS, read_runs

from qriemann.errors import InputError
from qriemann.optim.methods import find_method
from qriemann.reporting import reporting
from tests.recipe_fixtures import train_on


@dataclass(frozen=True, eq=False)
class Job:
    """One run; the tables show the `test` runs."""

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
        """Depends on every setting, so that a changed plan runs again."""
        return f"{self.training}-{'test' if self.test else 'search'}"

    @property
    def training(self) -> str:
        """Shared by a search and a test of the same settings: the second uses what the first trained."""
        settings = {name: value for name, value in vars(self).items() if name != "test"}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.task}-{self.arm}-{self.lr:g}-{self.seed}-{digest}"


def load_task(source: dict[str, Any], train: int, validation: int, test: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Training, validation and test rows with `messages` and `answer`; validation is cut from the training rows."""
    if "reasoning_gym" in source:
        rows = _reasoning_gym(source, train + validation + test)
        tested, rows = rows[:test], rows[test:]
    else:
        rows, tested = _read_rows(source["train"]), _read_rows(source["test"])[:test]
    if len(rows) <= validation:
        raise InputError(f"the task has {len(rows)} training rows; it needs more than the {validation} for validation")
    return rows[validation:], rows[:validation], tested


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
        raise InputError(f"{path}: cannot be read as one JSON object per line: {error}") from error


def is_right(said: str, answer: str) -> bool:
    """Whether a text is the answer, or ends with it after other words ("#### 72", "the correct answer is answer2")."""
    return re.search(rf"(?:^|\s){re.escape(answer)}[.\s]*$", said) is not None


def run_job(job: Job, results: Path) -> dict[str, Any]:
    """Trains, from the last checkpoint if there is one, and returns the run's line of `runs.jsonl`.

    A test of a rate that the search has run resumes at that run's end, and keeps its curve and times.
    """
    from datasets import Dataset

    from qriemann.folder import records
    from qriemann.folder.contents import curve, read_json

    # Every arm sees the same rows in the same order: the trainer shuffles them by the seed.
    needed = job.values["max_steps"] * job.values["per_device_train_batch_size"]
    train_rows, validation, test = load_task(job.source, needed, job.validation_rows, job.test_rows)
    folder = _work(results, job)
    resume = any(folder.glob("checkpoint-*"))
    values = {**job.values, "output_dir": str(folder), "resume": resume, "overwrite": not resume}
    if find_method(values["method"]).on_manifold and values.setdefault("start", "offset") == "offset":
        # The studies' rank is the point's, and an offset was the default start when they were made.
        values |= {"lora_r": 2 * values["lora_r"], "lora_alpha": 2 * values["lora_alpha"]}
    result = train_on(
        values,
        train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in train_rows]),
        eval_dataset=Dataset.from_list([{"messages": row["messages"]} for row in validation]),
    )
    tested = {"test": _test(result, test)} if job.test else {}
    searched = next((run for run in read_runs(results) if run["key"] == replace(job, test=False).key), None)
    if job.test and searched is not None:
        return {**searched, "key": job.key, **tested}
    history = records.read_metrics(folder)
    described = read_json(folder / records.RUN)
    return {
        "key": job.key,
        **vars(job),
        "source": {key: value for key, value in job.source.items() if key not in ("train", "test")},
        "curve": curve(history, "loss"),
        "validation": curve(history, "eval_loss"),
        "validation_loss": result.eval_loss,
        "tokens": max((record.get("num_tokens", 0) for record in history), default=0),
        "tokens_per_s": result.tokens_per_s,
        "wall_clock_s": result.wall_clock_s,
        "cpu_s": time.process_time(),
        "peak_gib": result.peak_gib,
        "resumed": resume,
        "machine": {key: described.get(key) for key in ("versions", "device")},
        **tested,
    }


def _test(result: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    from qriemann.data.sources import Source
    from qriemann.data.tokenized import tokenize_rows
    from qriemann.evaluation.evaluate import greedy_answers
    from qriemann.evaluation.reload import Row
    from qriemann.evaluation.rows import Rows

    tokenizer = result.tokenizer
    table = Source(Dataset.from_list([{"messages": row["messages"]} for row in rows]), "test")
    loss = result.trainer.evaluate(tokenize_rows(table, None, tokenizer).train, metric_key_prefix="test")["test_loss"]
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


def _work(results: Path, job: Job) -> Path:
    return results / "work" / job.training


def finish(job: Job, results: Path) -> None:
    """Runs the job, adds its line, and removes its folder after the last use."""
    line = json.dumps(run_job(job, results)) + "\n"
    # One write, so that the lines of runs that end together do not mix.
    with (results / RUNS).open("a", encoding="utf-8") as lines:
        lines.write(line)
    if job.test:
        shutil.rmtree(_work(results, job))


if __name__ == "__main__":
    job, results = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    sys.exit(reporting(lambda: finish(job, results) or 0))
