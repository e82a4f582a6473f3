"""What a run leaves beside its adapter: `metrics.jsonl` (one line a log event), `run.json` and `loss.png`.

Every file is replaced in one move, so a reader or a crash never sees half of one; only `metrics.jsonl` grows line by line.
"""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import qriemann
from qriemann.checkpoints.manifest import checkpoint_folders, delete_checkpoint
from qriemann.folder.contents import curve, read_lines
from qriemann.folder.files import replace_file
from qriemann.folder.private import hide_credentials

METRICS, RUN, PLOT = "metrics.jsonl", "run.json", "loss.png"
# The files that say a folder holds a run, and that `overwrite` removes; anything else in the folder is left alone.
_RUN_FILES = (RUN, METRICS, PLOT, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def run_files(folder: Path) -> list[Path]:
    """The records, adapter files and checkpoints of a run in this folder."""
    if not folder.is_dir():
        return []
    return [folder / name for name in _RUN_FILES if (folder / name).exists()] + sorted(checkpoint_folders(folder))


def remove_run(folder: Path) -> None:
    """Removes what `run_files` lists."""
    for path in run_files(folder):
        delete_checkpoint(path) if path.is_dir() else path.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file by the content, without credentials; numbers that JSON has no word for become strings."""
    text = hide_credentials(json.dumps(finite(dict(content)), indent=2))
    replace_file(path, lambda partial: partial.write_text(f"{text}\n", encoding="utf-8"))


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds one JSON line to `metrics.jsonl`."""
    with (folder / METRICS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(finite(dict(record))) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`."""
    return read_lines(folder / METRICS)


def rewind_metrics(folder: Path, step: int) -> None:
    """Keeps the records up to a step: a resumed run repeats the steps after its checkpoint and logs them again."""
    kept = [record for record in read_metrics(folder) if record["step"] <= step and "train_runtime" not in record]
    replace_file(folder / METRICS, lambda partial: partial.write_text("".join(json.dumps(r) + "\n" for r in kept)))


def plot_losses(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws training and held-out loss over the steps."""
    # Figure alone draws with Agg; pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "held out", "o")):
        points = curve(records, key)
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker or None, markersize=4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(visible=True, alpha=0.3)
    if axes.has_data():
        axes.legend()
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device, for `run.json`."""
    versions = {"qriemann": qriemann.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.processor() or platform.machine())
    return {
        "versions": versions,
        "device": {
            "type": device.type,
            "name": name,
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
    }


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def finite(value: Any) -> Any:
    """The value with numbers that JSON has no word for as strings."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
