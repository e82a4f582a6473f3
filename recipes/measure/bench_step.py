"""Times one optimizer step on all adapters of a model, each optimizer against torch's fused AdamW.

Every optimizer gets its own copy of the adapters of every linear layer but the head, and the gradient of the same random
G = P D Q^T of low rank plus noise. G is never formed: the factors get G a^T and b^T G, which for a point U S V^T are its
blocks G V and (G^T U)^T. Only `step()` is timed. The optimizers take turns in a rotating order, so that a slow moment of the
machine hits all of them; before each step the gradients are computed afresh at the current point and the caches are
overwritten, as a backward pass would.

    floor   float32 bytes that a step must move: each factor, gradient and state read once, each factor and state written
            once. AdamW reads four tall blocks and writes three; Riemannion and Muon, with momentum alone, three and two.
    state   bytes that the optimizer keeps from step to step: its torch state and the cores S.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import bench
import torch
from contenders import BASELINE, ENTRIES, GRADIENT_SETS, MODELS, Contender, Gradients, Shape, adapter_shapes
from torch import Tensor

from qriemann.errors import InputError

# Larger than the last-level cache of any CPU core complex or GPU we know of.
_EVICTED_BYTES = 128 * 2**20


def state_bytes(contender: Contender) -> int:
    """Bytes of the optimizer's torch state and of the cores."""
    entries = contender.optimizer.state.values()
    tensors = [*contender.cores, *(value for entry in entries for value in entry.values() if isinstance(value, Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def launches_and_synchronizations(step: Callable[[], None]) -> tuple[int, int]:
    """Kernel launches (a captured graph is one) and host synchronizations of one step on CUDA, from torch.profiler."""

    def count(body: Callable[[], None]) -> tuple[int, int]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            body()
        names = [event.name for event in profile.events()]
        launched = sum(bool(re.match(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)", n)) for n in names)
        # The plain cudaMemcpy blocks; the asynchronous one does not by itself.
        waited = sum(bool(re.match(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$", n)) for n in names)
        return launched, waited

    launched, waited = count(step)
    # The profiler itself waits for the device when it stops.
    return launched, waited - count(lambda: None)[1]


def measure(
    shapes: Sequence[Shape], rank: int, names: Sequence[str], *, rounds: int, warmup: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """A record for each optimizer: times, ratios to the baseline and bytes, or the reason why it has none."""
    reasons: dict[str, str] = {}
    contenders: dict[str, Contender] = {}
    for name in names:
        try:
            contenders[name] = ENTRIES[name].build(shapes, rank, device)
        except Exception as error:  # The row of an optimizer that cannot run says why; the others go on.
            reasons[name] = bench.reason(error)
    gradients = Gradients(shapes, rank, device, seed=1)
    eviction = torch.zeros(_EVICTED_BYTES // 4, device=device)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.disable()
    try:
        for turn in range(warmup + rounds):
            order = list(contenders)
            shift = turn % max(len(order), 1)
            for name in order[shift:] + order[:shift]:
                gradients.leave(contenders[name].pairs, turn)
                eviction.add_(1)
                try:
                    elapsed = _timed(contenders[name].optimizer.step, device)
                except Exception as error:
                    reasons[name] = bench.reason(error)
                    del contenders[name]
                    continue
                if turn >= warmup:
                    times[name].append(elapsed)
            gc.collect()
    finally:
        gc.enable()
    records = {}
    for name in names:
        records[name] = {"what": ENTRIES[name].what, "ran": name not in reasons}
        if name in reasons:
            records[name]["reason"] = reasons[name]
            continue
        base = times.get(BASELINE) if BASELINE not in reasons else None
        gradients.leave(contenders[name].pairs, 0)
        launches, synchronizations = (
            launches_and_synchronizations(contenders[name].optimizer.step) if device.type == "cuda" else (None, None)
        )
        records[name] |= {
            "times_ms": times[name],
            "median_ms": statistics.median(times[name]),
            "ratio_of_medians": statistics.median(times[name]) / statistics.median(base) if base else None,
            "median_of_ratios": statistics.median(map(float.__truediv__, times[name], base)) if base else None,
            "state_bytes": state_bytes(contenders[name]),
            "floor_bytes": ENTRIES[name].floor_bytes(shapes, rank),
            "launches": launches,
            "synchronizations": synchronizations,
        }
    return records


def _timed(step: Callable[[], None], device: torch.device) -> float:
    """Wall-clock milliseconds, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole report, as `--json` writes it.

    Raises:
        InputError: an unknown name, a missing device, or a rank above the smallest layer.
    """
    names, device = bench.chosen(ENTRIES, options.only), bench.chosen_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = adapter_shapes(options.model, options.layers)
    smallest = min(min(shape) for shape in shapes)
    if options.rank > smallest:
        raise InputError(f"--rank must be at most {smallest}, the smallest side of a layer, got {options.rank}")
    settings = {key: getattr(options, key) for key in ("model", "layers", "rank", "rounds", "warmup")} | {
        "adapters": len(shapes),
        "shapes": [list(shape) for shape in shapes],
        "evicted_bytes": _EVICTED_BYTES,
        "gradient_sets": GRADIENT_SETS,
    }
    facts = bench.machine(device)
    results = measure(shapes, options.rank, names, rounds=options.rounds, warmup=options.warmup, device=device)
    return {"settings": settings, "machine": facts, "results": results}


def main(options: argparse.Namespace) -> int:
    report = run(options)
    settings, host = report["settings"], report["machine"]
    columns = ["median ms", "p10 - p90", "ratio", "by round", "state MiB", "floor MiB", "launches", "syncs"]
    rows = {}
    for name, record in report["results"].items():
        if record["ran"]:
            times = torch.tensor(record["times_ms"])
            low, high = times.quantile(0.1).item(), times.quantile(0.9).item()
            ratios = [record["ratio_of_medians"], record["median_of_ratios"]]
            rows[name] = [
                f"{record['median_ms']:.2f}",
                f"{low:.2f} - {high:.2f}",
                *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
                *(f"{record[key] / 2**20:.1f}" for key in ("state_bytes", "floor_bytes")),
                *("-" if record[key] is None else str(record[key]) for key in ("launches", "synchronizations")),
            ]
    where = host["gpu"]["name"] if host["gpu"] else f"{host['cpu']}, {host['device']['threads']} threads"
    title = (
        f"one step, {settings['adapters']} adapters of {settings['model']}, rank {settings['rank']}, "
        f"{settings['rounds']} rounds; ratios to {BASELINE}; {where}, torch {host['versions']['torch']}"
    )
    bench.finish(report, options.json, title, columns, rows)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help=f"{', '.join(MODELS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=bench.count, default=30, help="timed steps of each optimizer (default: %(default)s)"
    )
    bench.add_arguments(parser, ENTRIES, warmup=5)
