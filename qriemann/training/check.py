"""Finds out, before hours are spent, whether a run is right and fits: its rows, and its longest batch on this machine."""

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from qriemann.data.account import Account
from qriemann.data.defects import Defect, refuse
from qriemann.memory.dry_run import (
    Measured,
    make_ready,
    measure_evaluation_batch,
    measure_step,
    measure_training_batch,
    mixed_samples,
    too_large,
)
from qriemann.memory.plan import GIB, Plan, plan
from qriemann.training.display import summary_table
from qriemann.training.prepare import Prepared
from qriemann.training.rows_page import preview, write_page
from qriemann.training.trainer import build_trainer
from qriemann.upstream import quiet


@dataclass(frozen=True)
class Check:
    """What was found and measured.

    Attributes:
        training, evaluation: the longest batch of each; None without held-out rows, or where it did not fit.
        planned_gib: the peak that `plan` computes.
    """

    defects: tuple[Defect, ...]
    training: Measured
    evaluation: Measured | None
    step_seconds: float
    planned_gib: float


def check(
    prepared: Prepared,
    vram_gib: float | None = None,
    console: Console | None = None,
    html: str | os.PathLike[str] | None = None,
) -> Check:
    """Takes the longest batch through forward, backward, step and evaluation, and looks at the rows.

    Args:
        prepared: from `prepare`; the step moves its adapter, so it is not to be trained afterwards.
        vram_gib: memory that the run is to keep to; None for what this machine has.
        console: where the preview and the figures are drawn; standard output by default.
        html: a file for a page with a sample of the rows and counts over all; None for none.

    Raises:
        InputError: for anything that stops the run, and for errors in the data that `allow` does not name.
    """
    console = console or Console()
    if html is not None:
        # First: it may show why the batches do not fit, or why the rows are refused.
        write_page(Path(html).expanduser(), prepared.rows, [*prepared.data.notices, *map(str, prepared.defects)])
        console.print(f"rows: {html}", markup=False, highlight=False, soft_wrap=True)
    planned = plan(prepared.settings, dense_copies=prepared.dense is not None and prepared.dense.held)
    with quiet(bars=console.is_terminal):
        result = _measure(prepared, planned, vram_gib)
    for title, text in preview(prepared.rows):
        console.print(Panel(text, title=title, title_align="left"))
    console.print(summary_table(_figures(prepared.account, result), title="check"))
    refuse(result.defects, prepared.settings.allow, lambda line: console.print(line, markup=False, highlight=False))
    return result


def _figures(account: Account, result: Check) -> list[tuple[str, str]]:
    train, tokens, trained = account.train, account.train.lengths.sum(), account.train.trained.sum()
    rows = [
        ("rows, held out", f"{len(train)}, {len(account.held_out or ())}"),
        ("tokens, trained", f"{tokens}, {trained} ({trained / tokens:.0%})"),
        ("longest row", f"{train.lengths.max()} tokens"),
    ]
    for name, batch in (("training", result.training), ("evaluation", result.evaluation)):
        if batch is not None:
            card = f" ({batch.card_gib:.2f} GiB of the card)" if batch.card_gib else ""
            taken = f"{batch.seconds:.1f} s, peak {batch.peak_gib:.2f} GiB{card}"
            rows.append((f"longest {name} batch, {batch.rows} x {batch.tokens} tokens", taken))
    return [
        *rows,
        ("optimizer step", f"{result.step_seconds:.2f} s"),
        ("planned peak, all rows at max_length", f"{result.planned_gib:.2f} GiB"),
    ]


def _measure(prepared: Prepared, planned: Plan, vram_gib: float | None) -> Check:
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(prepared.args)
        args.output_dir = folder
        trainer = build_trainer(prepared, args=args)
        make_ready(trainer)
        defects = [*prepared.defects, *mixed_samples(trainer, prepared.data)]
        on_cpu = args.device.type == "cpu"
        training = measure_training_batch(trainer, counted=on_cpu, keep_gradients=True)
        step_seconds = measure_step(trainer)
        evaluation = None
        if prepared.data.held_out is not None:
            evaluation, unfit = measure_evaluation_batch(trainer, counted=on_cpu)
            defects += unfit
    defects += _beyond(training, evaluation, planned, vram_gib)
    return Check(tuple(defects), training, evaluation, step_seconds, planned.peak / GIB)


def _beyond(training: Measured, evaluation: Measured | None, planned: Plan, vram_gib: float | None) -> list[Defect]:
    """The batches that need more than the card that was asked about has."""
    if vram_gib is None:
        return []
    # On a CPU only what the batch adds was counted; the rest is the plan's, Python and its libraries aside.
    held = sum(size for _, size in planned.stored[:-1])
    found: list[Defect] = []
    for name, batch in (("training", training), ("evaluation", evaluation)):
        if batch is not None:
            needed = batch.card_gib if batch.counted is None else (held + batch.counted) / GIB
            reason = f"{needed:.2f} GiB needed, {vram_gib:g} GiB available"
            found += [too_large(name, batch.rows, reason)] if needed > vram_gib else []
    return found
