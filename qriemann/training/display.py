"""What a person sees while a model trains: a live picture on a terminal, one line a log event anywhere else.

`Monitor` is the trainer's callback: it measures, writes `metrics.jsonl` and hands each record to a view. The views only draw.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qriemann.folder.contents import curve
from qriemann.folder.records import append_metrics, peak_gib, read_metrics
from qriemann.training.seam import fixed_rank_optimizer

Record = Mapping[str, Any]

_BLOCKS = "▁▂▃▄▅▆▇█"
# Bits of the eight dots of a braille character, by column and row.
_BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))

# Under this key the state of a trainer's checkpoints holds the monitor's clock.
_KEY = "qriemann_monitor"

# (key of the record, its name, its format), in the order in which they are shown.
_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("eval_loss", "held-out loss", "{:.4f}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("tokens_per_s", "tokens/s", "{:.0f}"),
    ("peak_gib", "peak memory", "{:.2f} GiB"),
    ("orthonormality_drift", "orthonormality drift", "{:.1e}"),
)


class PlainView:
    """One line for each log event; for pipes, files and notebooks."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total = 0

    def start(self, *, first_step: int, total_steps: int) -> None:
        self.total = total_steps

    def step(self, step: int) -> None:
        """Nothing: a line a step would be noise."""

    def log(self, record: Record) -> None:
        shown = _shown(record)
        if shown:
            eta = f"  eta {_clock(record['eta_s'])}" if "eta_s" in record else ""
            body = "  ".join(f"{name} {value}" for name, value in shown)
            self.note(f"step {record['step']}/{self.total or '?'}  {body}{eta}")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing is held open."""


class SilentView(PlainView):
    """Nothing but notes: for a caller that draws its own progress."""

    def log(self, record: Record) -> None:
        """Nothing."""


class LiveView(PlainView):
    """Progress bar with the time left, loss curve, held-out losses and the current numbers, redrawn in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._records: list[Record] = []
        self._latest: dict[str, str] = {}
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=None)
        self._live: Live | None = None

    def start(self, *, first_step: int, total_steps: int) -> None:
        super().start(first_step=first_step, total_steps=total_steps)
        self._progress.reset(self._task, total=total_steps, completed=first_step)
        self._live = Live(self._picture(), console=self.console, refresh_per_second=4, transient=False)
        self._live.start()

    def step(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def log(self, record: Record) -> None:
        self._records.append(record)
        self._latest.update(_shown(record))
        if self._live is not None:
            self._live.update(self._picture())

    def stop(self) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            self._live.stop()
            self._live = None

    def _picture(self) -> Group:
        width = max(min(self.console.width - 22, 100), 10)
        losses = [value for _, value in curve(self._records, "loss")]
        held_out = [value for _, value in curve(self._records, "eval_loss")]
        numbers = Table.grid(padding=(0, 3))
        for _, name, _ in _COLUMNS:
            if name in self._latest:
                numbers.add_column(justify="left")
        names = [name for _, name, _ in _COLUMNS if name in self._latest]
        numbers.add_row(*(Text(name, style="dim") for name in names))
        numbers.add_row(*(Text(self._latest[name], style="bold") for name in names))
        drawing = Table.grid(padding=(0, 2))
        if losses:
            high, low = f"{max(losses):.3f}", f"{min(losses):.3f}"
            lines = draw_curve(losses, width=width, height=6)
            labels = ["loss", high, *[""] * (len(lines) - 3), low]
            drawing.add_row(Text("\n".join(labels), style="dim"), Text("\n".join(lines), style="cyan"))
        if held_out:
            span = f"{held_out[0]:.3f} to {held_out[-1]:.3f}"
            drawing.add_row(
                Text("held out", style="dim"), Text(f"{draw_sparkline(held_out[-width:])}  {span}", style="green")
            )
        return Group(self._progress, drawing, numbers)


def make_view(choice: str = "auto", console: Console | None = None) -> PlainView:
    """The view for this terminal.

    Args:
        choice: "live", "plain", "none", or "auto" for live on a terminal that can draw it.
        console: where to draw; standard output by default.
    """
    console = console or Console()
    if choice == "none":
        return SilentView(console)
    can_draw = console.is_terminal and not console.is_dumb_terminal and console.encoding.lower().startswith("utf")
    return LiveView(console) if choice == "live" or (choice == "auto" and can_draw) else PlainView(console)


class Monitor(TrainerCallback):
    """Measures a run and records it; the trainer's own progress callbacks are to be removed.

    Args:
        view: draws the records.
        folder: of `metrics.jsonl`.
        device: whose peak memory counts.
        on_begin: called with the first step once the model and the optimizer stand and before anything is recorded; the
            place for the first write of a run.

    Attributes:
        records: of the run, those before a resume included.
    """

    def __init__(self, view: PlainView, folder: Path, device: torch.device, on_begin: Callable[[int], None]) -> None:
        self.view = view
        self.records: list[dict[str, Any]] = []
        self.begun = False
        self._folder, self._device, self._on_begin = folder, device, on_begin
        self._started = self._step_started = time.perf_counter()
        self._first_step = 0
        self._train_seconds = 0.0
        # Tokens and seconds of training at the last log event.
        self._logged = (0.0, 0.0)

    @property
    def tokens_per_s(self) -> float:
        """Tokens through the model a second of training, from the beginning of the run to the last log event."""
        tokens, seconds = self._logged
        return tokens / seconds if seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()
        self._first_step = state.global_step
        seconds, *logged = map(float, state.stateful_callbacks.get(_KEY, (0.0, 0.0, 0.0)))
        self._train_seconds, self._logged = seconds, (logged[0], logged[1])
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        if state.is_world_process_zero:
            self._on_begin(state.global_step)
            self.begun = True
            self.records = read_metrics(self._folder)
            self.view.start(first_step=state.global_step, total_steps=state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._train_seconds += time.perf_counter() - self._step_started
        self._remember(state)
        if state.is_world_process_zero:
            self.view.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        record: dict[str, Any] = {
            "step": state.global_step,
            "epoch": state.epoch,
            "seconds": round(time.perf_counter() - self._started, 3),
            **{key: value for key, value in logs.items() if key not in ("epoch", "total_flos")},
        }
        if "loss" in logs:
            record.update(self._measure(state, logs, kwargs.get("optimizer")))
        self.records.append(record)
        append_metrics(self._folder, record)
        self.view.log(record)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.view.stop()

    def _remember(self, state: TrainerState) -> None:
        """Puts into the trainer's state what a resumed run goes on from."""
        state.stateful_callbacks[_KEY] = [self._train_seconds, *self._logged]

    def _measure(self, state: TrainerState, logs: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
        """What the trainer does not log: speed over the steps since the last event, memory, drift, time left."""
        # TRL counts the tokens of all batches, padding excluded, and the guard goes on counting after a resume.
        total = float(logs.get("num_tokens", 0))
        tokens, seconds = total - self._logged[0], self._train_seconds - self._logged[1]
        self._logged = (total, self._train_seconds)
        self._remember(state)
        done = max(state.global_step - self._first_step, 1)
        elapsed = time.perf_counter() - self._started
        measured = {
            "tokens_per_s": round(tokens / seconds, 1) if seconds > 0 else 0.0,
            "peak_gib": round(peak_gib(self._device), 4),
            "eta_s": round(elapsed / done * (state.max_steps - state.global_step), 1),
        }
        on_manifold = fixed_rank_optimizer(optimizer)
        if on_manifold is not None:
            measured["orthonormality_drift"] = float(on_manifold.orthonormality_drift())
        return measured


def summary_table(rows: Sequence[tuple[str, str]], *, title: str) -> Table:
    """A table of two columns for the end of a run."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def draw_curve(values: Sequence[float], *, width: int, height: int) -> list[str]:
    """The values as a line of braille dots, the latest at the right edge of what is drawn.

    Args:
        values: in order; more than 2 `width` of them are averaged in runs.
        width, height: in characters, of 2 x 4 dots each.

    Returns:
        `height` lines of at most `width` characters, the largest value at the top.
    """
    columns = _averages(values, 2 * width)
    low, high = min(columns), max(columns)
    last_row = 4 * height - 1
    rows = [round((high - value) / (high - low) * last_row) if high > low else last_row for value in columns]
    cells = [[0] * ((len(rows) + 1) // 2) for _ in range(height)]
    for x, y in enumerate(rows):
        # Dots down or up to the previous value join the line.
        previous = rows[x - 1] if x else y
        for dot in range(min(y, previous), max(y, previous) + 1):
            cells[dot // 4][x // 2] |= _BRAILLE[x % 2][dot % 4]
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def draw_sparkline(values: Sequence[float]) -> str:
    """One block character a value, the lowest and highest value at the lowest and highest block."""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def _averages(values: Sequence[float], count: int) -> list[float]:
    if len(values) <= count:
        return list(values)
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _shown(record: Record) -> list[tuple[str, str]]:
    return [
        (name, form.format(record[key]))
        for key, name, form in _COLUMNS
        if isinstance(record.get(key), int | float) and not isinstance(record.get(key), bool)
    ]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
