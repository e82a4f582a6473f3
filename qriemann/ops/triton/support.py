"""Whether the kernels can run, decided before Triton is asked to compile anything."""

from __future__ import annotations

import os

import torch

# A 256 x 256 core is the largest that one program works on in reasonable time.
MAX_RANK = 128
# Triton's own floor for float32 products, Volta.
_MIN_CAPABILITY = (7, 0)


def supported(device: torch.device | str, rank: int) -> str | None:
    """None where the Triton path can run, else the reason in words, to follow "the batched PyTorch path runs because".

    On the CPU the kernels run under TRITON_INTERPRET=1 alone, which is for tests: it is a thousand times slower.
    """
    device = torch.device(device)
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return f"the Triton kernels need a CUDA device, got {device.type}"
    if rank > MAX_RANK:
        return f"the Triton kernels go up to rank {MAX_RANK}, got {rank}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device.type == "cuda":
        if torch.version.hip:
            return "the Triton kernels have not been tried on AMD GPUs"
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            return (
                f"the Triton kernels need compute capability {'.'.join(map(str, _MIN_CAPABILITY))}, "
                f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
            )
    return None
