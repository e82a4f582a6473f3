"""`eval --tasks`: the tasks of lm-evaluation-harness, run on a model that is loaded here."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qriemann.errors import InputError, MissingExtraError
from qriemann.evaluation.evaluate import load_model
from qriemann.upstream import quiet

_BATCH = 8


def run_tasks(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    *,
    base: str | None = None,
    max_rows: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """The harness's results for one model or several, and a table of them with its standard errors.

    Args:
        models: as `evaluate` takes them.
        tasks: names of the harness, or YAML files that define one. Prompts go through the tokenizer's chat template if it has
            one, which published figures for base models did not.
        base: of the adapters, instead of the one that they name.
        max_rows: the first so many rows of each task.
        console: where the table is printed; None for nowhere.

    Returns:
        For each model its name and, under `results`, what the harness measured by task and metric.

    Raises:
        MissingExtraError: the harness is not installed.
        InputError: a model cannot be used, or the harness has no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"--tasks needs lm-evaluation-harness ({error}); pip install lm-eval") from error

    console = console or Console(quiet=True)
    manager = TaskManager()
    unknown = [task for task in tasks if not Path(task).is_file() and not manager.match_tasks([task])]
    if unknown or not tasks:
        raise InputError(
            f"lm-evaluation-harness has no task {unknown[0]!r}; lm-eval ls tasks lists them"
            if unknown
            else "--tasks names no task; lm-eval ls tasks lists them"
        )
    found = []
    with quiet():
        for name in map(str, models):
            model, tokenizer = load_model(name, base, console)
            results = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH),
                tasks=list(tasks),
                limit=max_rows,
                apply_chat_template=tokenizer.chat_template is not None,
                task_manager=manager,
                log_samples=False,
            )["results"]
            found.append({"model": Path(name).name, "results": results})
            # Another model may be about to be loaded.
            del model
            gc.collect()
    console.print(_table(found))
    return found


def _table(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="lm-evaluation-harness; standard errors", title_justify="left")
    for name in ("task", "metric", *(one["model"] for one in found)):
        table.add_column(name, overflow="fold")
    for task, metrics in found[0]["results"].items():
        for key, value in metrics.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            cells = [_cell(one["results"][task], metric, variant) for one in found]
            table.add_row(task, metric if variant == "none" else f"{metric}, {variant}", *cells)
    return table


def _cell(metrics: dict[str, Any], metric: str, variant: str) -> str:
    value, error = metrics[f"{metric},{variant}"], metrics.get(f"{metric}_stderr,{variant}")
    return f"{value:.4f} \N{PLUS-MINUS SIGN} {error:.4f}" if isinstance(error, float) else f"{value:.4f}"
