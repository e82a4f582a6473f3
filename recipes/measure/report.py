"""Writes the tables and plots of a study from its `runs.jsonl` alone."""

import argparse
import itertools
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qriemann.errors import InputError

RUNS, TABLE, OVERVIEW = "runs.jsonl", "report.md", "overview.png"
_REFERENCE = "adamw"
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_NEAR_BEST = 1.01
# Steps at either end of the training curve. Where no row repeats, each step's loss is on rows not yet trained on.
_END = 20

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


def best_rate(runs: Iterable[Run]) -> float:
    """The learning rate with the lowest validation loss; a loss that is not finite never wins."""
    return min(runs, key=lambda run: _order(run["validation_loss"]))["lr"]


def _order(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf


def sensitivity(runs: Iterable[Run]) -> float:
    """How far apart two learning rates can lie whose validation loss is within 1 % of the best, as a ratio.

    Between two measured rates the loss is taken as linear in the logarithm of the rate.
    """
    points = sorted((math.log(run["lr"]), _order(run["validation_loss"])) for run in runs)
    bound = _NEAR_BEST * min(loss for _, loss in points)
    inside = [x for x, loss in points if loss <= bound]
    edges = [min(inside), max(inside)]
    for (x, loss), (y, other) in itertools.pairwise(points):
        if (loss <= bound) != (other <= bound) and math.isfinite(loss) and math.isfinite(other):
            crossing = x + (y - x) * (bound - loss) / (other - loss)
            edges = [min(edges[0], crossing), max(edges[1], crossing)]
    return math.exp(edges[1] - edges[0])


def steps_to_reach(run: Run, loss: float) -> float | None:
    """Steps until the validation loss falls to `loss`, linear between evaluations; None if it never does."""
    before: tuple[float, float] | None = None
    for step, value in run["validation"]:
        if value <= loss:
            if before is None or before[1] == value:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = step, value
    return None


def paired(ours: dict[int, float], reference: dict[int, float]) -> tuple[float, float] | None:
    """Mean difference over the common seeds, and half the width of its 95 % interval (Student's t)."""
    differences = [ours[seed] - reference[seed] for seed in ours.keys() & reference.keys()]
    if len(differences) < 2:
        return None
    half = _T[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), half


def reference_arm(arm: str) -> str:
    """The arm that an arm is compared with: AdamW of the same rank ("muon-r64" with "adamw-r64")."""
    rank = re.search(r"-r\d+$", arm)
    return _REFERENCE + (rank[0] if rank else "")


def table(runs: list[Run], task: str) -> str:
    """A Markdown table of one task, best test loss first."""
    tested: dict[str, list[Run]] = defaultdict(list)
    searched: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run["task"] == task:
            (tested if run["test"] else searched)[run["arm"]].append(run)
    columns = (
        *("arm", "lr", "test loss", "minus adamw, paired 95 %", "exact match (95 %)"),
        *(f"training loss, first {_END} steps", f"last {_END}", "steps to adamw's loss", "time to it"),
        *("lr range within 1 %", "s", "GiB"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm in sorted(tested, key=lambda name: statistics.mean(_order(run["test"]["loss"]) for run in tested[name])):
        lines.append(f"| {' | '.join(_cells(arm, tested[arm], tested.get(reference_arm(arm), []), searched[arm]))} |")
    return "\n".join(lines)


def _cells(arm: str, group: list[Run], reference: list[Run], searched: list[Run]) -> list[str]:
    losses = {run["seed"]: run["test"]["loss"] for run in group}
    of_reference = {run["seed"]: run for run in reference}
    gap = None
    if arm != reference_arm(arm):
        gap = paired(losses, {seed: run["test"]["loss"] for seed, run in of_reference.items()})
    steps, seconds = [], []
    for run in group:
        if run["seed"] in of_reference:
            other = of_reference[run["seed"]]
            reached = steps_to_reach(run, other["validation_loss"])
            share = None if reached is None else reached / other["values"]["max_steps"]
            steps.append(share)
            mine, theirs = _seconds(run), _seconds(other)
            if mine and theirs:
                seconds.append(share and share * mine / theirs)
    return [
        arm,
        f"{group[0]['lr']:g}",
        _spread(list(losses.values())),
        "" if gap is None else f"{gap[0]:+.3f} ± {gap[1]:.3f}",
        _exact_match(group),
        _spread([statistics.mean(loss for _, loss in run["curve"][:_END]) for run in group]),
        _spread([statistics.mean(loss for _, loss in run["curve"][-_END:]) for run in group]),
        _reached(steps),
        _reached(seconds) if len(seconds) == len(steps) else "",
        f"{sensitivity(searched):.1f}x" if len(searched) > 1 else "",
        _spread([seconds for run in group if (seconds := _seconds(run))], digits=0),
        f"{max(run['peak_gib'] for run in group):.2f}",
    ]


def _exact_match(group: list[Run]) -> str:
    """The share of right answers with Wilson's 95 % interval for one seed's rows, because all seeds share them."""
    from qriemann.evaluation.evaluate import wilson

    rows = group[0]["test"]["rows"]
    found = wilson(round(statistics.mean(run["test"]["right"] for run in group)), rows)
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"


def _seconds(run: Run) -> float | None:
    """Seconds of the whole run; on a CPU, where runs share the cores, its CPU seconds if they were recorded."""
    return run.get("cpu_s") if run["machine"]["device"]["type"] == "cpu" else run["wall_clock_s"]


def _spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _reached(shares: list[float | None]) -> str:
    """The mean share of AdamW's own steps or seconds, or the number of runs that did not reach its loss."""
    found = [share for share in shares if share is not None]
    if len(found) < len(shares):
        return f"never in {len(shares) - len(found)} of {len(shares)}"
    return f"{statistics.mean(found):.2f}x" if found else ""


def write_report(folder: Path) -> str:
    """Writes report.md and a plot of each task into the folder and returns the report's text.

    Raises:
        InputError: the folder has no runs.
    """
    runs = read_runs(folder)
    if not runs:
        raise InputError(f"{folder / RUNS}: no runs there; `measure study PLAN.yaml` makes them")
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    parts = []
    for task in tasks:
        searched = sum(run["task"] == task and not run["test"] for run in runs)
        parts.append(f"## {task}\n\n{table(runs, task)}\n\n{searched} runs chose the learning rates.")
        _plot(runs, task, folder / f"{task}.png")
    text = "\n\n".join(parts) + "\n"
    (folder / TABLE).write_text(text, encoding="utf-8")
    return text


def _plot(runs: list[Run], task: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    by_rate, by_tokens, by_time = figure.subplots(1, 3)
    chosen = [run for run in runs if run["task"] == task]
    for index, arm in enumerate(dict.fromkeys(run["arm"] for run in chosen)):
        style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--", "label": arm}
        mine = [run for run in chosen if run["arm"] == arm]
        searched = sorted((run["lr"], run["validation_loss"]) for run in mine if not run["test"])
        if searched:
            by_rate.plot(*zip(*searched, strict=True), marker="o", markersize=3, **style)
        tested = [run for run in mine if run["test"]]
        if not tested:
            continue
        # A loss that was not finite is missing from its curve.
        curves = [dict(run["validation"]) for run in tested]
        steps = sorted(set.intersection(*map(set, curves)))
        losses = [statistics.mean(curve[step] for curve in curves) for step in steps]
        for axes, key in ((by_tokens, "tokens"), (by_time, "wall_clock_s")):
            unit = statistics.mean(run[key] for run in tested) / tested[0]["values"]["max_steps"]
            axes.plot([step * unit for step in steps], losses, **style)
    by_rate.set_xscale("log")
    for axes, label in ((by_rate, "learning rate, first seed"), (by_tokens, "tokens"), (by_time, "wall clock, s")):
        axes.set_xlabel(label)
        axes.set_ylabel("validation loss (nats a token)")
        axes.grid(visible=True, alpha=0.3)
    by_rate.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_overview(folders: dict[str, Path], path: Path) -> None:
    """Draws the test losses of several studies side by side: a row for each arm, a dot for each seed, a bar at their mean.

    Args:
        folders: of `runs.jsonl`, by the title of their panel.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (title, folder) in zip(figure.subplots(1, len(folders)), folders.items(), strict=True):
        arms: dict[str, list[float]] = defaultdict(list)
        for run in read_runs(folder):
            if run["test"]:
                arms[run["arm"]].append(run["test"]["loss"])
        names = sorted(arms, key=lambda arm: -statistics.mean(arms[arm]))
        for row, arm in enumerate(names):
            colour = "C1" if arm.startswith("riemannion") else "C0" if arm == _REFERENCE else "0.55"
            axes.plot(arms[arm], [row] * len(arms[arm]), "o", color=colour, markersize=4, alpha=0.6)
            axes.plot(statistics.mean(arms[arm]), row, "|", color=colour, markersize=13, markeredgewidth=2.5)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("test loss (nats per token), lower is better", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(visible=True, axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="the folder of a study's runs.jsonl, or recipes/results"
    )


def main(options: argparse.Namespace) -> int:
    if not (options.folder / "cpu").is_dir():
        print(_write(options.folder))
        return 0
    folders = {"sums, 60 steps": options.folder / "cpu", "reversed lists of words, 30 steps": options.folder / "words"}
    for folder in sorted(path.parent for path in options.folder.glob(f"*/{RUNS}")):
        print(_write(folder))
    draw_overview(folders, options.folder / OVERVIEW)
    return 0


def _write(folder: Path) -> str:
    """The report of a study, or of the beds, whose rows name one."""
    if any("bed" in run for run in read_runs(folder)):
        from bed_report import write_bed_report

        return write_bed_report(folder)
    return write_report(folder)
