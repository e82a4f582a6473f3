"""What a run leaves in its folder: `metrics.jsonl` (one line per log event), `run.json`, `loss.png`, checkpoints.

Each file but the growing `metrics.jsonl` is replaced in one move, so neither a reader nor a crash sees half of one.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qriemann
from qriemann.folder.contents import CURVE, ROWS, read_json, read_lines
from qriemann.folder.files import replace_text
from qriemann.folder.private import hide_credentials

# The command line looks for an earlier run before it waits for torch, which takes seconds to import.
if TYPE_CHECKING:
    import torch

# How the base of an adapter was loaded in training, for a folder without the run's own records.
TRAINED_ON = "trained_on.json"
METRICS, RUN, MANIFEST = "metrics.jsonl", "run.json", "manifest.json"
# The files that say a folder holds a run, and that `overwrite` removes; anything else in the folder is left alone.
_RUN_FILES = (RUN, METRICS, CURVE, ROWS, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What they say of the base.
_OF_THE_BASE = ("fingerprint", "quantized", "quant_type", "double_quant", "device", "dtype")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def run_files(folder: Path) -> list[Path]:
    """The records, adapter files and checkpoints of a run in this folder."""
    return [folder / name for name in _RUN_FILES if (folder / name).exists()] + checkpoint_folders(folder)


def remove_run(folder: Path) -> None:
    """Removes what `run_files` lists."""
    for path in run_files(folder):
        delete_checkpoint(path) if path.is_dir() else path.unlink()


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoint-N folders, complete or not, by step."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if path.is_dir() and _CHECKPOINT.fullmatch(path.name)), key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """N of checkpoint-N."""
    return int(folder.name.rpartition("-")[2])


def delete_checkpoint(folder: Path) -> None:
    """Deletes the folder; of a link to a folder kept elsewhere, only the link."""
    if folder.is_symlink():
        folder.unlink()
        return
    # First, so that an interrupted deletion leaves nothing that counts as complete.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file by the content, without credentials; numbers that JSON cannot express become strings."""
    replace_text(path, hide_credentials(json.dumps(finite(dict(content)), indent=2)) + "\n")


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
    replace_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device, for `run.json`."""
    import torch

    versions = {"qriemann": qriemann.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.processor() or platform.machine())
    described = {"type": device.type, "name": name, "threads": torch.get_num_threads(), "platform": platform.platform()}
    return {"versions": versions, "device": described}


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated by torch on a GPU, resident on a CPU."""
    import torch

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
    """The value with the numbers that JSON cannot express as strings."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def recorded_base(folder: Path) -> dict[str, Any]:
    """How the base of the adapter in a folder was loaded when it was trained, as a run's record has it.

    Empty where nothing says so: the adapter is from another tool, or was trained by a script and saved outside a checkpoint.
    """
    of_checkpoint = read_json(folder / MANIFEST).get("run")
    loaded = of_checkpoint.get("loaded") if isinstance(of_checkpoint, dict) else None
    for record in (read_json(folder / TRAINED_ON), read_json(folder / RUN).get("model"), loaded):
        if isinstance(record, dict) and isinstance(record.get("quantized"), bool):
            return {key: record.get(key) for key in _OF_THE_BASE}
    return {}
