"""Times one optimizer step on all adapters of a model, ours against the others: `python recipes/bench_step.py --rank 16`.

Every optimizer gets the adapters of every linear layer but the head, each its own copy, and the gradient of the same random
G = P D Q^T of low rank plus noise, which is never formed: the factors get G a^T and b^T G, which for a point U S V^T are its
blocks G V and (G^T U)^T. Only `step()` is timed. The optimizers take turns, in an order that rotates, so that a slow moment
of the machine hits all of them; before each step the gradients are computed afresh at the current point, into one of several
buffers, and the caches are overwritten, as a backward pass would.

Bytes, of float32, for L adapters with sum(m + n) rows in all and rank r:

    floor   (reads + writes) 4 r sum(m + n) + 8 L r^2 for optimizers with a core S: each input (factor, gradient, state) read
            once, each output (factor, state) written once. AdamW: 4 + 3 tall blocks. Momentum, Riemannion or Muon: 3 + 2.
    moved   what the dispatched torch operations read and write, one operation at a time: traffic if no cache held anything
            between two of them. What LAPACK or a fused operation does inside is counted once.
    state   what the optimizer keeps of the past: its torch state and the cores S.
    held    all memory that it keeps between steps beside parameters and gradients: state and workspace.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from step_contenders import BASELINE, ENTRIES, GRADIENT_SETS, MODELS, Contender, Gradients, Shape, adapter_shapes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qriemann.errors import InputError

# More than the last-level cache of any CPU core complex or GPU known to us.
_EVICTED_BYTES = 128 * 2**20


class Traffic(TorchDispatchMode):
    """Counts dispatched operations that touch data, and the bytes of their inputs and outputs."""

    # Their first argument is only written.
    _OVERWRITES = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})
    # They allocate, or rename: nothing is read or written. (Other views are known by their schema.)
    _UNTOUCHED = frozenset(
        {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}
    )
    # Written only under gradient scaling, whatever the schema says.
    _READ_ONLY = frozenset({("aten::_fused_adamw_", "grads")})

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        if func.is_view or schema.name in self._UNTOUCHED:
            return result
        self.operations += 1
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            size = sum(map(_bytes_of, _tensors(value)))
            written = argument.alias_info is not None and argument.alias_info.is_write
            written = written and (schema.name, argument.name) not in self._READ_ONLY
            overwritten = argument.is_out or (position == 0 and schema.name in self._OVERWRITES)
            self.bytes += size * (written + (not (written and overwritten)))
        results = result if len(schema.returns) > 1 else (result,)
        for returned, value in zip(schema.returns, results, strict=False):
            if returned.alias_info is None:
                self.bytes += sum(map(_bytes_of, _tensors(value)))
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _bytes_of(tensor: Tensor) -> int:
    # An expanded tensor reads less than it shows.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def held_bytes(contender: Contender) -> int:
    """Bytes of all storages that the optimizer reaches, without parameters and gradients."""
    factors = contender.factors()
    outside = {tensor.untyped_storage().data_ptr() for f in factors for tensor in (f, f.grad) if tensor is not None}
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _reachable(contender.optimizer, set())
    }
    return sum(size for address, size in sizes.items() if address not in outside)


def _reachable(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _reachable(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _reachable(item, seen)
    elif isinstance(value, torch.optim.Optimizer) or type(value).__module__.startswith(
        ("qriemann", Contender.__module__)
    ):
        yield from _reachable(getattr(value, "__dict__", {}), seen)


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


def bench(
    shapes: Sequence[Shape], rank: int, names: Sequence[str], *, rounds: int, warmup: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """A record for each name: times, ratios to BASELINE, bytes, operations, or the reason why there are none."""
    reasons: dict[str, str] = {}
    contenders: dict[str, Contender] = {}
    for name in names:
        try:
            contenders[name] = ENTRIES[name].build(shapes, rank, device)
        except Exception as error:  # A row that cannot run says why; the others go on.
            reasons[name] = _reason(error)
    gradients = Gradients(shapes, rank, device, seed=1)
    eviction = torch.zeros(_EVICTED_BYTES // 4, device=device)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    was_enabled = gc.isenabled()
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
                    reasons[name] = _reason(error)
                    del contenders[name]
                    continue
                if turn >= warmup:
                    times[name].append(elapsed)
            gc.collect()
    finally:
        if was_enabled:
            gc.enable()
    records = {}
    for name in names:
        if name in reasons:
            records[name] = {"what": ENTRIES[name].what, "ran": False, "reason": reasons[name]}
            continue
        gradients.leave(contenders[name].pairs, 0)
        records[name] = {
            "what": ENTRIES[name].what,
            "ran": True,
            "times_ms": times[name],
            **_bytes_and_counts(contenders[name], device),
            "floor_bytes": ENTRIES[name].floor_bytes(shapes, rank),
        }
    _add_statistics(records)
    return records


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _timed(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds on the wall, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _bytes_and_counts(contender: Contender, device: torch.device) -> dict[str, Any]:
    with Traffic() as traffic:
        contender.optimizer.step()
    counts: dict[str, Any] = {"launches": None, "synchronizations": None}
    if device.type == "cuda":
        counts["launches"], counts["synchronizations"] = launches_and_synchronizations(contender.optimizer.step)
    return {
        "state_bytes": state_bytes(contender),
        "held_bytes": held_bytes(contender),
        "moved_bytes": traffic.bytes if contender.traffic_is_dispatched else None,
        "operations": traffic.operations,
        **counts,
    }


def _add_statistics(records: dict[str, dict[str, Any]]) -> None:
    base = records.get(BASELINE, {})
    for record in records.values():
        if not record["ran"]:
            continue
        milliseconds = torch.tensor(record["times_ms"], dtype=torch.float64)
        for key, quantile in (("median_ms", 0.5), ("p10_ms", 0.1), ("p90_ms", 0.9)):
            record[key] = milliseconds.quantile(quantile).item()
    for record in records.values():
        if not record["ran"]:
            continue
        record["ratio_of_medians"] = record["median_of_ratios"] = None
        if base.get("ran"):
            ratios = torch.tensor(record["times_ms"], dtype=torch.float64) / torch.tensor(base["times_ms"])
            record["ratio_of_medians"] = record["median_ms"] / base["median_ms"]
            record["median_of_ratios"] = ratios.quantile(0.5).item()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on and the command line does not say."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": "".join(re.findall(r"BLAS_INFO=(\w+)", torch.__config__.show())),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "nvidia_smi": _nvidia_smi(),
        }
    return facts


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return found[0] if found else platform.processor()


def _nvidia_smi() -> dict[str, str] | str:
    """Power and clocks of every card, or why they are not known."""
    keys = "name,driver_version,power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return {f"card {index}": line for index, line in enumerate(output.strip().splitlines())}


def show(console: Console, report: dict[str, Any]) -> None:
    """Draws the report as a table."""
    settings, host = report["settings"], report["machine"]
    table = Table(
        title=f"one step, {settings['adapters']} adapters of {settings['model']}, rank {settings['rank']}, "
        f"{settings['rounds']} rounds",
        title_justify="left",
    )
    table.add_column("optimizer")
    names = ["median ms", "p10 - p90", "ratio", "by round", "state MiB", "held MiB", "moved MiB", "floor MiB", "ops"]
    names += ["launches", "syncs"] if host["gpu"] else []
    for name in names:
        table.add_column(name, justify="right")
    for name, record in report["results"].items():
        label = Text(name) + Text(f"\n{record['what'] if record['ran'] else record['reason']}", style="dim")
        if not record["ran"]:
            table.add_row(label, "did not run", style="yellow")
            continue
        cells = [
            f"{record['median_ms']:.2f}",
            f"{record['p10_ms']:.2f} - {record['p90_ms']:.2f}",
            _optional(record["ratio_of_medians"], "{:.2f}x"),
            _optional(record["median_of_ratios"], "{:.2f}x"),
            *(_optional(_mebibytes(record[f"{key}_bytes"]), "{:.1f}") for key in ("state", "held", "moved", "floor")),
            str(record["operations"]),
        ]
        if host["gpu"]:
            cells += [str(record["launches"]), str(record["synchronizations"])]
        table.add_row(label, *cells)
    console.print(table)
    where = host["gpu"]["name"] if host["gpu"] else f"{host['cpu']}, {host['threads']} threads"
    load = "" if host["load_average"] is None else f", load {host['load_average'][0]:.1f} before"
    console.print(
        f"ratio: to {BASELINE}, of medians and the median of each round's; {where}, torch {host['torch']}{load}"
    )
    if not host["gpu"]:
        console.print("launches and synchronizations: counted on CUDA only")


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole report, as `--json` keeps it.

    Raises:
        InputError: a name, a device or a rank that cannot be.
    """
    names = list(ENTRIES) if options.only is None else options.only.split(",")
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        raise InputError(f"--only must name some of {', '.join(ENTRIES)}, got {', '.join(map(repr, unknown))}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device must be cpu where there is no CUDA device, got cuda")
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = adapter_shapes(options.model, options.layers)
    smallest = min(min(shape) for shape in shapes)
    if options.rank > smallest:
        raise InputError(f"--rank must be at most {smallest}, the smallest side of a layer, got {options.rank}")
    facts = machine(device)
    results = bench(shapes, options.rank, names, rounds=options.rounds, warmup=options.warmup, device=device)
    settings = {
        "model": options.model,
        "layers": options.layers,
        "rank": options.rank,
        "adapters": len(shapes),
        "shapes": [list(shape) for shape in shapes],
        "device": str(device),
        "rounds": options.rounds,
        "warmup": options.warmup,
        "evicted_bytes": _EVICTED_BYTES,
        "gradient_sets": GRADIENT_SETS,
    }
    return {"settings": settings, "machine": facts, "results": results}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="bench_step.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help=f"{', '.join(MODELS)}, a Hub id or a local folder (default: %(default)s)",
    )
    parser.add_argument("--rank", type=_count, default=16, help="of every adapter (default: %(default)s)")
    parser.add_argument("--layers", type=_count, help="take only so many transformer layers (default: all)")
    parser.add_argument(
        "--rounds", type=_count, default=30, help="timed steps of each optimizer (default: %(default)s)"
    )
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: %(default)s)")
    parser.add_argument("--threads", type=_count, help="of torch (default: torch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--only", metavar="NAME,...", help=f"some of {', '.join(ENTRIES)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything, every time included, in FILE")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 2 for something the user can mend, which one line then names."""
    options = parse(arguments)
    try:
        report = run(options)
    except InputError as error:
        if options.debug:
            raise
        print(f"bench_step: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    console = Console()
    # Ten columns; a pipe counts as 80 characters wide.
    show(console if console.is_terminal else Console(width=150), report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
