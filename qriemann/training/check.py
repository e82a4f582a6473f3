"""Everything that can go wrong before hours are spent: one dry run on the real model, the real rows and this machine.

It is the training itself, in a folder that is thrown away, ended before its first step.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qriemann.config.settings import RunConfig
from qriemann.data.defects import Defect, preview, refuse
from qriemann.data.formats import trained_token_count
from qriemann.memory.dry_run import DryRun, Measured, too_large_evaluation
from qriemann.memory.plan import GIB, Plan, plan
from qriemann.training.run import train


@dataclass
class Check:
    """What was found and measured.

    Attributes:
        defects: errors first.
        rows, held_out_rows, tokens, trained_tokens, longest: of the data, before it is cut or packed.
        training, evaluation: the longest batch of each; None without held-out rows, or where it did not fit.
        step_seconds: of one optimizer step.
        planned_gib: the peak that `plan` foretells.
    """

    defects: list[Defect]
    rows: int
    held_out_rows: int
    tokens: int
    trained_tokens: int
    longest: int
    training: Measured
    evaluation: Measured | None
    step_seconds: float
    planned_gib: float


def check(config: RunConfig, vram_gib: float | None = None, console: Console | None = None) -> Check:
    """Takes the longest batch of a configuration's run through forward, backward, step and evaluation, and looks at its rows.

    Args:
        config: from `load_config`; its output folder is not touched.
        vram_gib: memory that the run is to keep to; None for what this machine has.
        console: where the preview and the figures are drawn; standard output by default.

    Raises:
        InputError: for anything that stops the run, and for errors in the data that `allow` does not name.
    """
    console = console or Console()
    planned = plan(config)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(
                _thrown_away(config, folder), instead=lambda dry_run, optimizer: _examine(dry_run, optimizer, planned)
            )
        except _Examined as end:
            result, texts = end.result, end.preview
    console.print(
        *(
            Panel(text, title=f"row {n}, trained tokens in brackets", title_align="left")
            for n, text in enumerate(texts, 1)
        )
    )
    console.print(describe(result))
    result.defects += _too_large(result, planned, vram_gib)
    refuse(result.defects, config.qriemann.allow, lambda line: console.print(line, markup=False, highlight=False))
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
            table.add_row(f"longest {name} batch, {size}", f"{batch.seconds:.1f} s, peak {batch.peak_gib:.2f} GiB")
    table.add_row("optimizer step", f"{result.step_seconds:.2f} s")
    table.add_row("planned peak, all rows at max_length", f"{result.planned_gib:.2f} GiB")
    return table


def _thrown_away(config: RunConfig, folder: str) -> RunConfig:
    """The same run in another folder, ready to be ended before its first step."""
    sft = copy.copy(config.sft)
    sft.output_dir, sft.push_to_hub = folder, False
    ours = replace(config.qriemann, auto_batch=False, resume=None, overwrite=False, push=None, display="none")
    return replace(config, sft=sft, qriemann=ours)


class _Examined(Exception):  # noqa: N818 - it is how the run ends, no error
    def __init__(self, result: Check, preview: list[Text]) -> None:
        super().__init__()
        self.result, self.preview = result, preview


def _examine(dry_run: DryRun, optimizer: Any, planned: Plan) -> NoReturn:
    """Everything of a first step, in the place where the real one would begin."""
    trainer, data = dry_run.trainer, dry_run.data
    defects = dry_run.defects + dry_run.mixed_samples()
    on_cpu = trainer.args.device.type == "cpu"
    training = dry_run.training_batch(counted=on_cpu, keep_gradients=True)
    started = time.perf_counter()
    optimizer.step()
    step_seconds = time.perf_counter() - started
    optimizer.zero_grad()
    evaluation = None
    if trainer.eval_dataset is not None:
        evaluation, more = dry_run.evaluation_batch(counted=on_cpu)
        defects += more
    lengths = [len(ids) for batch in data.train.iter(1000) for ids in batch["input_ids"]]
    result = Check(
        defects=defects,
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
    raise _Examined(result, preview(data.train, trainer.processing_class))


def _too_large(result: Check, planned: Plan, vram_gib: float | None) -> list[Defect]:
    """What was measured, held against the card that was asked about."""
    if vram_gib is None:
        return []
    # On a CPU only what the batch adds was counted; the rest is the plan's, Python and its libraries aside.
    held = sum(size for _, size in planned.stored[:-1])
    found = []
    for name, batch in (("training", result.training), ("evaluation", result.evaluation)):
        if batch is None:
            continue
        needed = batch.peak_gib if batch.counted is None else (held + batch.counted) / GIB
        if needed <= vram_gib:
            continue
        got = f"{needed:.2f} GiB where there are {vram_gib:g}"
        if name == "evaluation":
            found.append(too_large_evaluation(batch.rows, got))
        else:
            found.append(
                Defect(
                    "training-too-large",
                    f"the longest batch, {batch.rows} rows of up to {batch.tokens} tokens, must fit",
                    got,
                    "see `qriemann plan --vram` for the cheapest change",
                    error=True,
                )
            )
    return found
