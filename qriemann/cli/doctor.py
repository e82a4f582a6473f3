"""`qriemann doctor`: whether this machine can run qriemann, on one screen, and the line that mends what is wrong."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qriemann.cli.parser import Commands

COMMANDS = Commands()
# A download of a model of 8 billion parameters, with room to merge it at half precision.
_ROOM_GB = 32


class Finding(NamedTuple):
    """One line of the screen."""

    what: str
    found: str
    remedy: str | None = None


@COMMANDS.add("doctor", "say what qriemann can use on this machine, and what to fix (exits with 1 if anything)")
def _doctor() -> int:
    wrong = 0
    for finding in findings():
        wrong += finding.remedy is not None
        print(f"{'ok   ' if finding.remedy is None else 'wrong'} {finding.what:<14} {finding.found}", flush=True)
        if finding.remedy is not None:
            print(f"      {'':<14} -> {finding.remedy}")
    print("nothing to fix" if not wrong else f"{wrong} to fix")
    return 1 if wrong else 0


def findings() -> Iterator[Finding]:
    """Every finding, as soon as it is known: importing torch takes seconds."""
    new_enough = sys.version_info >= (3, 11)
    system = f"{platform.python_version()} on {platform.platform()}"
    yield Finding("Python", system, None if new_enough else "install Python 3.11 or newer")
    yield from _versions()
    try:
        importlib.import_module("torch")
    except Exception as error:  # a damaged installation raises anything
        yield Finding("torch", _line(error), "pip install --force-reinstall torch")
        return
    yield from _torch_and_cards()
    yield _bitsandbytes()
    yield _triton()
    yield from _folders()


def _versions() -> Iterator[Finding]:
    """The installed packages against the versions that the tests run with, which are qriemann's lower bounds."""
    from packaging.requirements import Requirement

    try:
        stated = [Requirement(text) for text in importlib.metadata.requires("qriemann") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("versions", "qriemann is not installed as a package", "pip install -e . in its folder")
        return
    needed = [one for one in stated if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = 0
    for one in needed:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not one.specifier.contains(version, prereleases=True):
            wrong += 1
            yield Finding(
                one.name, f"{version}, tested with {one.specifier}", f'pip install "{one.name}{one.specifier}"'
            )
    yield Finding("versions", f"{len(needed) - wrong} of {len(needed)} packages within the tested ones")


def _torch_and_cards() -> Iterator[Finding]:
    import torch

    from qriemann.device import compute_dtype, describe_device, read_driver, unused_gpu

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("torch", f"{torch.__version__}, {built}")
    driver = read_driver()
    said = "no NVIDIA driver" if driver is None else f"NVIDIA's, for CUDA up to {driver[2]}; {driver[1]} GPUs"
    yield Finding("driver", said, unused_gpu())
    if not torch.cuda.is_available():
        place = describe_device(torch.device("cpu"), compute_dtype(torch.device("cpu")))
        yield Finding("card", f"none that torch can use: {place}")
        yield Finding("works here", "every command, at CPU speed; `plan` says what a run will need on a card")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(device)
        dtype = compute_dtype(device)
        free, total = torch.cuda.mem_get_info(device)
        remedy = None if free > total / 2 else "end what else uses it; nvidia-smi lists the processes"
        yield Finding(f"card {index}", f"{describe_device(device, dtype)}; compute capability {major}.{minor}", remedy)
        try:
            torch.ones(1, device=device).add(1).item()
        except RuntimeError as error:
            yield Finding("torch", _line(error), f"install a build of torch for compute capability {major}.{minor}")


def _bitsandbytes() -> Finding:
    """Quantizes a little matrix where a run would, and multiplies by it."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        matrix = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64)
        packed, state = functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
        # The widest of NF4's 16 steps is 0.3 of a block's largest value.
        error = (functional.dequantize_4bit(packed, state) - matrix).abs().max().item()
    except Exception as error:
        built = f" for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        return Finding(
            "bitsandbytes", _line(error), f"pip install -U bitsandbytes; it has no library{built} that loads"
        )
    version = importlib.metadata.version("bitsandbytes")
    if not error < 0.2:
        return Finding("bitsandbytes", f"{version}, 4-bit weights are {error:.2g} off", "pip install -U bitsandbytes")
    return Finding("bitsandbytes", f"{version}, 4-bit weights work on {device.type}")


def _triton() -> Finding:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding("triton", "not installed; only the fused kernels need it")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    return Finding("triton", f"{version}, C compiler {compiler or 'none, which the fused kernels need'}")


def _folders() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, name, key in (("model cache", HF_HUB_CACHE, "HF_HUB_CACHE"), ("this folder", ".", None)):
        folder = Path(name).expanduser().absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        remedy = None
        if not os.access(there, os.W_OK):
            remedy = f"give yourself the right to write {there}" + (f", or set {key}" if key else "")
        elif free < 1:
            remedy = "free some space" + (f", or set {key} to a larger disk" if key else "")
        short = "" if free > _ROOM_GB else f" (an 8B model takes {_ROOM_GB // 2} GB, merged as much again)"
        yield Finding(what, f"{folder}, {free:.0f} GB free{short}", remedy)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.150}"
