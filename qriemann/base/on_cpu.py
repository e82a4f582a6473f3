"""Advice and settings for training on a CPU; the dequantized weights are in dense_weights.py."""

import ctypes
import logging
import platform

from torch import nn

logger = logging.getLogger(__name__)

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def warn_of_checkpointing(model: nn.Module) -> None:
    """Warns of what gradient checkpointing, on by default in TRL, costs on a CPU."""
    on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if on and next(model.parameters()).device.type == "cpu":
        logger.warning(
            "gradient checkpointing is on: on a CPU a step takes half as long again; where memory allows, set "
            "gradient_checkpointing=False"
        )


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, where its allocator is glibc's: each step needs the same memory again.

    Otherwise every large tensor is a mapping of its own, whose pages the kernel clears at each allocation.
    """
    if platform.libc_ver()[0] == "glibc":
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_MMAP_MAX, 0)
        allocator.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
