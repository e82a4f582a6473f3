"""Proves on one GPU, in minutes and without a network, that what is right on a CPU is right and fast there.

The parts come in the order of their worth, each in a process of its own with its own time limit. Every fact is in the JSON
file as soon as it is known, so what a part found stays when its time is up. `--device cpu` goes through all of it at small
sizes: then the only thing that is new on a card is the card.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import bench
import torch

from qriemann.device import prefer_expandable_segments
from qriemann.errors import InputError
from qriemann.folder.files import replace_text
from qriemann.upstream import quiet

# Each part's module and its seconds; the whole is cut at `--minutes`, the last parts first.
PARTS: dict[str, tuple[str, int]] = {
    "basics": ("card_right", 60),
    "commands": ("card_right", 180),
    "numbers": ("card_right", 60),
    "memory": ("card_cost", 150),
    "speed": ("card_cost", 120),
    "step": ("card_cost", 60),
    "starts": ("card_cost", 60),
}
# On a CPU the same takes several times as long.
_CPU_SECONDS = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="where every fact goes as it is known")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu rehearses at small sizes (default: cuda)")
    parser.add_argument("--only", metavar="PART,...", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together (default: %(default)s)")
    # How this program starts a part in its own process.
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> int:
    """0 if every fact with a bound is within it, 1 if not or if a part did not end."""
    device = bench.chosen_device(options.device or "cuda")
    if options.part is not None:
        return _run(options.part, options.json, device)
    names = bench.chosen(PARTS, options.only)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    # Parts of an earlier call stay: a second call can fill in what the first had no time for.
    content = json.loads(options.json.read_text("utf-8")) if options.json.exists() else {"parts": {}}
    if content.get("device", device.type) != device.type:
        raise InputError(f"{options.json} holds facts of {content['device']}; name another file")
    content["device"] = device.type
    replace_text(options.json, json.dumps(content, indent=1) + "\n")
    end = time.monotonic() + 60 * options.minutes if device.type == "cuda" else float("inf")
    for name in names:
        limit = PARTS[name][1] if device.type == "cuda" else _CPU_SECONDS
        _start(name, options.json, device.type, min(limit, end - time.monotonic()))
    return _conclude(options.json, names)


def _start(name: str, path: Path, device: str, seconds: float) -> None:
    """Runs one part in its own process, and kills it with all that it started when its time is up."""
    print(f"{name}, at most {max(seconds, 0):.0f} s", flush=True)
    content = json.loads(path.read_text("utf-8"))
    content["parts"][name] = {"facts": {}, "ended": "there was no time left"}
    replace_text(path, json.dumps(content, indent=1) + "\n")
    if seconds <= 1:
        return
    command = [sys.executable, str(Path(__file__).parent), "on_a_card", "--part", name, "--json", str(path)]
    started = time.monotonic()
    process = subprocess.Popen([*command, "--device", device], start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
        ended = "finished" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        ended = f"out of time after {seconds:.0f} s"
    finally:
        if hasattr(os, "killpg") and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    content = json.loads(path.read_text("utf-8"))
    content["parts"][name] |= {"ended": ended, "seconds": round(time.monotonic() - started, 1)}
    replace_text(path, json.dumps(content, indent=1) + "\n")
    print(f"  {ended}, {content['parts'][name]['seconds']} s", flush=True)


def _run(name: str, path: Path, device: torch.device) -> int:
    """The part itself, in the process that `_start` has made for it."""
    prefer_expandable_segments()
    # Two runs that should give the same bits need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["TQDM_DISABLE"] = "1"
    with quiet():
        report = importlib.import_module("card_model").Report(path, name, device, small=device.type == "cpu")
    try:
        with quiet():
            getattr(importlib.import_module(PARTS[name][0]), name)(report)
    except Exception as error:
        report.tell("error", traceback.format_exc(limit=-4), right=False)
        print(f"  {bench.reason(error)}", file=sys.stderr)
        return 1
    return 0


def _conclude(path: Path, names: list[str]) -> int:
    parts = json.loads(path.read_text("utf-8"))["parts"]
    wrong = [
        f"{part}: {name}" for part in names for name, fact in parts[part]["facts"].items() if fact["right"] is False
    ]
    unfinished = [f"{name}: {parts[name]['ended']}" for name in names if parts[name]["ended"] != "finished"]
    proved = sum(fact["right"] is True for name in names for fact in parts[name]["facts"].values())
    print(f"{proved} facts are right, {len(wrong)} wrong, {len(unfinished)} parts unfinished")
    for line in (*wrong, *unfinished):
        print(f"  {line}")
    return 1 if wrong or unfinished else 0
