"""Writes the table and picture of the beds from their rows: every grid of rates, and where the measured one falls."""

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qriemann.errors import InputError

RUNS, TABLE, PICTURE = "runs.jsonl", "report.md", "rates.png"
_TASKS = {"sums": "sums", "words": "lists of words", "sort-shift": "sort and shift", "running-sum": "running sums"}


Run = dict[str, Any]


def read_runs(folder: Path) -> list[Run]:
    """The runs of a folder, each once; skips a last line that a crash left unfinished."""
    path = folder / RUNS
    runs: dict[str, Run] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            run = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs[run["key"]] = run
    return list(runs.values())


class Cell(NamedTuple):
    """What a grid of rates has in common."""

    bed: str
    task: str
    width: int
    depth: int
    layers: int
    rank: int
    batch: int
    steps: int
    arm: str

    @property
    def shape(self) -> str:
        """The model and the run in a few words."""
        model = "SmolLM2-135M" if self.bed == "tail" else f"toy of width {self.width}, {self.depth} layers"
        adapted = "layer" if self.layers == 1 else "layers"
        batch = "" if self.batch == 8 else f", batches of {self.batch}"
        return f"{model}: {self.layers} {adapted} adapted, rank {self.rank}{batch}, {self.steps:,} steps"


class Grid(NamedTuple):
    """The held-out losses of one cell.

    Attributes:
        losses: of the first seed, by rate, ascending.
        exact: its share of right answers at the best rate.
        seeds: the losses of all seeds at the rate that is best over most of them.
        measured: the measured rate of the first seed; None where there is none.
        trained: the loss of a training at the measured rate, if there was one.
    """

    losses: dict[float, float]
    exact: float
    seeds: list[float]
    measured: float | None
    trained: float | None

    @property
    def best(self) -> float:
        """The rate with the lowest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def there(self) -> float | None:
        """The loss at the measured rate: of a training, or along straight lines in log-log; None outside the grid."""
        if self.trained is not None or self.measured is None:
            return self.trained
        points = [(math.log(x), math.log(y)) for x, y in self.losses.items() if math.isfinite(y) and y > 0]
        x = math.log(self.measured)
        for (low, left), (high, right) in itertools.pairwise(points):
            if low <= x <= high:
                return math.exp(left + (right - left) * (x - low) / (high - low))
        return None


def grids(runs: Sequence[Run]) -> dict[Cell, Grid]:
    """The grids of all cells whose rows are there, the embedded model's first."""
    rates = {_place(run): run["rate"] for run in runs if not run["steps"]}
    found: dict[Cell, dict[float, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    trained: dict[Cell, Run] = {}
    for run in runs:
        if run["steps"] and not run["task"].endswith(".jsonl"):
            if run["lr"] != "auto":
                found[_cell(run)][run["rate"]][run["seed"]] = run
            elif run["seed"] == 0:
                trained[_cell(run)] = run
    grids = {}
    for cell in sorted(found, key=lambda cell: (cell.bed, -cell.layers, cell)):
        by_rate = found[cell]
        firsts = {rate: by_seed[0] for rate, by_seed in sorted(by_rate.items()) if 0 in by_seed}
        losses = {rate: run["loss"] for rate, run in firsts.items()}
        best = min(losses, key=losses.__getitem__)
        by_seeds = [[run["loss"] for run in by_seed.values()] for by_seed in by_rate.values()]
        seeds = min(by_seeds, key=lambda found: (-len(found), statistics.mean(found)))
        measured, there = rates.get(_place(firsts[best])), None
        if cell in trained:
            measured, there = trained[cell]["rate"], trained[cell]["loss"]
        grids[cell] = Grid(losses, firsts[best]["exact"], seeds, measured, there)
    return grids


def write_report(folder: Path) -> str:
    """Writes report.md and rates.png into the folder and returns the report's text.

    Raises:
        InputError: the folder has no runs.
    """
    found = grids(read_runs(folder))
    if not found:
        raise InputError(f"{folder / RUNS}: no runs there; `measure beds PLAN.yaml` makes them")
    columns = (
        "task",
        "run",
        "arm",
        "held-out loss by learning rate",
        "right",
        "over seeds",
        "measured rate",
        "loss there",
        "behind the best",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for cell, grid in found.items():
        losses = ", ".join(
            f"**{rate:g} {_figure(loss)}**" if rate == grid.best else f"{rate:g} {_figure(loss)}"
            for rate, loss in grid.losses.items()
        )
        there, spread = grid.there, ""
        if len(grid.seeds) > 1:
            mean, deviation = statistics.mean(grid.seeds), statistics.stdev(grid.seeds)
            spread = f"{_figure(mean)} ± {_figure(deviation)} ({len(grid.seeds)})"
        lines.append(
            f"| {_TASKS.get(cell.task, cell.task)} | {cell.shape} | {cell.arm} | {losses} | {grid.exact:.0%} | {spread} | "
            f"{'' if grid.measured is None else f'{grid.measured:.2g}'} | {_figure(there) if there else ''} | "
            f"{f'{there / grid.losses[grid.best] - 1:+.0%}' if there else ''} |"
        )
    text = "\n".join(lines) + "\n"
    (folder / TABLE).write_text(text, encoding="utf-8")
    _draw(found, folder / PICTURE)
    return text


def _draw(found: dict[Cell, Grid], path: Path) -> None:
    """Loss beyond the best against the rate as a multiple of the measured one: a curve for each grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (arm, title) in zip(panels, (("riemannion-zero", "Riemannion"), ("adamw", "AdamW")), strict=True):
        chosen = {
            cell: grid for cell, grid in found.items() if cell.arm == arm and grid.measured and len(grid.losses) > 2
        }
        for cell, grid in chosen.items():
            excess = [loss - grid.losses[grid.best] for loss in grid.losses.values()]
            real = cell.bed == "tail"
            axes.plot(
                [rate / grid.measured for rate in grid.losses],
                [100 * value / grid.losses[grid.best] for value in excess],
                marker="o",
                markersize=4 if real else 2.5,
                linewidth=1.6 if real else 0.8,
                color="C1" if real else "0.6",
            )
        axes.axvline(1, color="C0", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_ylim(-3, 100)
        axes.set_title(f"{title}: {len(chosen)} grids", fontsize=9)
        axes.set_xlabel("learning rate / measured rate", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("held-out loss above the grid's best, %", fontsize=8)
    figure.savefig(path, dpi=110)


def _cell(run: Run) -> Cell:
    saved = run["rank"] * (2 if run["options"].get("start") == "offset" else 1)
    sizes = {key: run.get(key) or 0 for key in ("width", "depth")}
    return Cell(rank=saved, **sizes, **{key: run[key] for key in ("bed", "task", "layers", "batch", "steps", "arm")})


def _place(run: Run) -> tuple[Any, ...]:
    """What the measured rate depends on."""
    keys = ("bed", "task", "width", "depth", "layers", "rank", "batch", "method", "scale", "dtype")
    return (*(run.get(key) for key in keys), *sorted((key, str(value)) for key, value in run["options"].items()))


def _figure(loss: float) -> str:
    return f"{loss:.3f}" if loss >= 0.1 else f"{loss:.2g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of runs.jsonl")


def main(options: argparse.Namespace) -> int:
    print(write_report(options.folder))
    return 0
