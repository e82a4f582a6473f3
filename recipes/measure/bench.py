"""What both benchmarks share: their options, the facts about the machine, the table and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qriemann.errors import InputError
from qriemann.folder.records import environment


def add_arguments(parser: argparse.ArgumentParser, names: Iterable[str], *, warmup: int) -> None:
    """Adds the options that both benchmarks take; `names` are the contenders."""
    parser.add_argument("--rank", type=count, default=16, help="of every adapter (default: %(default)s)")
    parser.add_argument("--layers", type=count, help="take only the first so many transformer layers (default: all)")
    parser.add_argument("--warmup", type=int, default=warmup, help="untimed steps at the start (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="of torch (default: torch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--only", metavar="NAME,...", help=f"some of {', '.join(names)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, every time included, to FILE")


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def chosen(known: Iterable[str], only: str | None) -> list[str]:
    """The contenders to run.

    Raises:
        InputError: `--only` names an unknown one.
    """
    names = list(known) if only is None else only.split(",")
    unknown = [name for name in names if name not in list(known)]
    if unknown:
        raise InputError(f"--only must name some of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    return names


def chosen_device(name: str | None) -> torch.device:
    """The device of `--device`, or CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def reason(error: Exception) -> str:
    """The one-line reason why a contender did not run."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the options."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpu.read_text(), re.MULTILINE) if cpu.exists() else []
    facts: dict[str, Any] = {
        **environment(device),
        "cpu": names[0] if names else None,
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpu": None,
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": card.name,
            "memory_gib": card.total_memory / 2**30,
            "compute_capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "nvidia_smi": _nvidia_smi(),
        }
    return facts


def _nvidia_smi() -> list[str]:
    """Driver, power and clocks of every card, or why they are unknown."""
    keys = "name,driver_version,power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return [f"unknown: {error}"]


def finish(
    report: dict[str, Any], path: Path | None, title: str, columns: Sequence[str], rows: dict[str, Sequence[str]]
) -> None:
    """Prints a row for each contender, or the reason why it has none, and writes the report to `path`."""
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    for column in columns:
        table.add_column(column, justify="right")
    for name, record in report["results"].items():
        label = Text(name) + Text(f"\n{record['what'] if record['ran'] else record['reason']}", style="dim")
        table.add_row(label, *(rows[name] if record["ran"] else ["did not run"]))
    console = Console()
    # A pipe counts as 80 characters wide, which is too few for the columns.
    (console if console.is_terminal else Console(width=150)).print(table)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
