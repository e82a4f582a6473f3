"""Where a process computes and in which dtype, and what it says when memory is short."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from qriemann.errors import InputError, ShortMemoryError

GIB = 2**30
#: Multiplies a loss whose gradients would underflow in float16, as those of a mean over thousands of tokens do; a power of
#: two changes no digit in the other dtypes.
LOSS_SCALE = 2.0**10

# cuInit's answers on a machine without a usable card: none there or all hidden, and a stub in the place of the driver.
_NO_DEVICE, _STUB = 100, 34
_CGROUP = Path("/sys/fs/cgroup")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_ON_CPU = "compute on the CPU with use_cpu: true (for other commands, set CUDA_VISIBLE_DEVICES=-1)"


def compute_device(name: torch.device | str | None = None) -> torch.device:
    """The named device; by default this process' GPU, or the CPU where there is none."""
    prefer_expandable_segments()
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        refuse_unused_gpu()
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # A build without CUDA raises AssertionError, a missing GPU AcceleratorError (a RuntimeError), a bad type TypeError.
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(f"device must be one of {', '.join(present)} on this machine, got {str(name)!r}") from error
    return device


def compute_dtype(device: torch.device, wanted: torch.dtype | str | None = None) -> torch.dtype:
    """The requested float dtype; by default bfloat16 on a GPU that has it, float32 elsewhere.

    Before Ampere (compute capability 8.0) bfloat16 is emulated, slower than float32. Without a GPU, `plan` takes one that
    has it.
    """
    if wanted is None or wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and _has_bfloat16(device) else torch.float32
    resolved = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype must be float32, bfloat16, float16 or None (chosen by the device), got {wanted!r}")
    return resolved


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """One line about the device, its free memory and the dtype, with the alternatives."""
    name = str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        return f"the {device.type.upper()}, {torch.get_num_threads()} threads, in {name}"
    free, total = torch.cuda.mem_get_info(device)
    said = f"{torch.cuda.get_device_name(device)} ({device}, {free / GIB:.1f} of {total / GIB:.1f} GiB free), in {name}"
    if not _has_bfloat16(device) and dtype == torch.float32:
        said += ": it has no bfloat16; dtype: float16 is faster, and its small gradients can underflow"
    if (count := torch.cuda.device_count()) > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        said += f"; one of {count} GPUs: CUDA_VISIBLE_DEVICES=N takes another, accelerate launch all of them"
    return said


def refuse_unused_gpu() -> None:
    """Raises InputError where there is an NVIDIA GPU that torch cannot use, rather than train for hours on the CPU."""
    if (reason := unused_gpu()) is not None:
        raise InputError(f"there is an NVIDIA GPU and torch cannot use it: {reason}; or {_ON_CPU}")


def unused_gpu() -> str | None:
    """Why torch cannot use a GPU whose driver is installed, with the remedy; None where there is no GPU or all is well."""
    if torch.cuda.is_available() or (driver := read_driver()) is None or driver[0] in (_NO_DEVICE, _STUB):
        return None
    status, count, cuda = driver
    if status:
        return f"the driver answers with error {status}; restart the machine, or install the driver again"
    if not count:
        return None
    built_for = torch.version.cuda
    if built_for is None:
        return f"torch {torch.__version__} is a build without CUDA; install torch's build for CUDA {cuda} or older"
    if int(built_for.partition(".")[0]) > int(cuda.partition(".")[0]):
        return (
            f"torch {torch.__version__} needs a driver for CUDA {built_for}, and this one serves CUDA {cuda}; update the "
            f"driver, or install torch's build for CUDA {cuda}"
        )
    try:
        torch.cuda.init()
    except Exception as error:
        return f"{' '.join(str(error).split()):.200}; reinstall the driver or torch"
    return "torch.cuda.is_available() is False; restart the process"


def read_driver() -> tuple[int, int, str] | None:
    """cuInit's status, the number of GPUs and the newest CUDA of NVIDIA's driver; None where there is no driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    count, version = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    if not status:
        driver.cuDeviceGetCount(ctypes.byref(count))
    return status, count.value, f"{version.value // 1000}.{version.value % 1000 // 10}"


def prefer_expandable_segments() -> None:
    """Lets torch's CUDA allocator grow its blocks, which leaves fewer gaps, unless the user has configured it.

    It is read at the first allocation on a GPU. Windows has no such mode.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def free_bytes(device: torch.device) -> int:
    """The bytes of a device that this process can still take; on the CPU within its container's limit (cgroup v2)."""
    if device.type == "cuda":
        # What torch's allocator has reserved and does not use is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    # No such files, or "max" for no limit.
    except (OSError, ValueError):
        return free
    # Cached files, such as the weights that were just read, give way.
    return min(free, limit - used + int(counts["inactive_file"]) + int(counts["active_file"]))


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, where its allocator is glibc's: each step needs the same memory again.

    Otherwise every large tensor is a mapping of its own, whose pages the kernel clears at each allocation.
    """
    if platform.libc_ver()[0] == "glibc":
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_MMAP_MAX, 0)
        allocator.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def describe_shortage(error: BaseException) -> str:
    """What was asked for and what was free, as far as the error says so."""
    text = " ".join(str(error).split())
    asked = re.search(r"tried to allocate ([\d.]+) (\w+)", text, re.IGNORECASE)
    free = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    size = asked and (f"{int(asked[1]) / GIB:.2f} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}")
    parts = [f"{size} were asked for" if size else "", f"{free[2]} of {free[1]} were free" if free else ""]
    return " and ".join(part for part in parts if part) or f"{text:.100}" or "no size was given"


@contextmanager
def explaining_memory(what: str, change: str | Callable[[], str]) -> Iterator[None]:
    """Turns an allocation that fails in the block into one line.

    Args:
        change: the cheapest change that needs less memory, or a function that finds it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = change if isinstance(change, str) else change()
        raise ShortMemoryError(f"out of memory while {what}: {describe_shortage(error)}; {remedy}") from error


def _has_bfloat16(device: torch.device) -> bool:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)
