"""Finds out, before hours are spent, whether a run is right and fits: its rows, and its longest batch on this machine."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from qriemann.data.defects import Defect, preview, refuse
from qriemann.data.tokenized import token_lengths, trained_token_count
from qriemann.memory.dry_run import (
    Measured,
    evaluation_too_large,
    make_ready,
    measure_evaluation_batch,
    measure_step,
    measure_training_batch,
    mixed_samples,
)
from qriemann.memory.plan import GIB, Plan, plan
from qriemann.training.prepare import Prepared
from qriemann.training.rows_page import write_page
from qriemann.training.trainer import build_trainer
from qriemann.upstream import quiet


@dataclass(frozen=True)
class Check:
    """What was found and measured.

    Attributes:
        defects: of the rows and of the measured batches.
        rows, held_out_rows, tokens, trained_tokens, longest: of the data, before it is cut or packed.
        training, evaluation: the longest batch of each; None without held-out rows, or where it did not fit.
        step_seconds: of one optimizer step.
        planned_gib: the peak that `plan` computes.
    """

    defects: tuple[Defect, ...]
    rows: int
    held_out_rows: int
    tokens: int
    trained_tokens: int
    longest: int
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
    for number, text in enumerate(preview(prepared.data.train, prepared.tokenizer), 1):
        console.print(Panel(text, title=f"row {number}, trained tokens in brackets", title_align="left"))
    console.print(describe(result))
    allow = prepared.settings.allow
    refuse(result.defects, allow, lambda line: console.print(line, markup=False, highlight=False))
    return result


def describe(result: Check) -> Table:
    """The figures as a table."""
    table = Table(title="check", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("rows, held out", f"{result.rows}, {result.held_out_rows}")
    share = result.trained_tokens / result.tokens
    table.add_row("tokens, trained", f"{result.tokens}, {result.trained_tokens} ({share:.0%})")
    table.add_row("longest row", f"{result.longest} tokens")
    for name, batch in (("training", result.training), ("evaluation", result.evaluation)):
        if batch is not None:
            size = f"{batch.rows} x {batch.tokens} tokens"
            card = f" ({batch.card_gib:.2f} GiB of the card)" if batch.card_gib else ""
            table.add_row(
                f"longest {name} batch, {size}", f"{batch.seconds:.1f} s, peak {batch.peak_gib:.2f} GiB{card}"
            )
    table.add_row("optimizer step", f"{result.step_seconds:.2f} s")
    table.add_row("planned peak, all rows at max_length", f"{result.planned_gib:.2f} GiB")
    return table


def _measure(prepared: Prepared, planned: Plan, vram_gib: float | None) -> Check:
    data = prepared.data
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(prepared.args)
        args.output_dir = folder
        trainer = build_trainer(prepared, args=args)
        make_ready(trainer)
        defects = [*prepared.defects, *mixed_samples(trainer, data)]
        on_cpu = args.device.type == "cpu"
        training = measure_training_batch(trainer, counted=on_cpu, keep_gradients=True)
        step_seconds = measure_step(trainer)
        evaluation = None
        if data.held_out is not None:
            evaluation, too_large = measure_evaluation_batch(trainer, counted=on_cpu)
            defects += too_large
    lengths = token_lengths(data.train)
    return Check(
        defects=(*defects, *_too_large(training, evaluation, planned, vram_gib)),
        rows=len(data.train),
        held_out_rows=0 if data.held_out is None else len(data.held_out),
        tokens=sum(lengths),
        trained_tokens=trained_token_count(data.train),
        longest=max(lengths),
        training=training,
        evaluation=evaluation,
        step_seconds=step_seconds,
        planned_gib=planned.peak / GIB,
    )


def _too_large(training: Measured, evaluation: Measured | None, planned: Plan, vram_gib: float | None) -> list[Defect]:
    """The batches that need more than the card that was asked about has."""
    if vram_gib is None:
        return []
    # On a CPU only what the batch adds was counted; the rest is the plan's, Python and its libraries aside.
    held = sum(size for _, size in planned.stored[:-1])
    found = []
    for name, batch in (("training", training), ("evaluation", evaluation)):
        if batch is None:
            continue
        needed = batch.card_gib if batch.counted is None else (held + batch.counted) / GIB
        if needed <= vram_gib:
            continue
        reason = f"{needed:.2f} GiB needed, {vram_gib:g} GiB available"
        if name == "evaluation":
            found.append(evaluation_too_large(batch.rows, reason))
            continue
        problem = f"the longest batch, {batch.rows} rows of up to {batch.tokens} tokens, does not fit ({reason})"
        remedy = "see `qriemann plan --vram` for the cheapest change"
        found.append(Defect("training-too-large", problem, remedy, error=True))
    return found
