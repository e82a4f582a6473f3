"""Compiles every kernel of a step for a GPU that is not there, and prints as JSON what ptxas says of it.

    python -m tests.ops.triton.offline CAPABILITY RANK

In a process of its own, because the tests beside it choose Triton's interpreter for theirs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from qriemann.ops.triton.step import TritonStep


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_kernels(capability: int, rank: int, *, nesterov: bool) -> list[Any]:
    """The kernels of one step of two layers, as `TritonStep` launches them."""
    driver.set_active(AbsentGpu(capability))
    kernels: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(launch(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    try:
        heights = (256, 192, 320, 256)
        step = TritonStep(
            [torch.zeros(t, rank) for t in heights],
            [torch.zeros(t, rank) for t in heights],
            torch.zeros(2, rank, rank),
            torch.zeros((), dtype=torch.int64),
        )
        grads = [torch.zeros(t, rank) for t in heights[:2]] + [torch.zeros(rank, t) for t in heights[2:]]
        step.step(grads, *torch.zeros(3, 2), nesterov=nesterov)
    finally:
        JITFunction.run = launch
    return kernels


def resources(kernel: Any, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of a program, and whether a product is in TF32."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        ptxas = (
            Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if capability >= 100 else "ptxas")
        )
        architecture = re.search(r"\.target (\w+)", ptx)[1]
        command = [str(ptxas), "-v", f"--gpu-name={architecture}", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {
        "name": kernel.metadata.name,
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "threads": 32 * kernel.metadata.num_warps,
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "shared": kernel.metadata.shared,
        "tf32": "tf32" in ptx,
    }


if __name__ == "__main__":
    capability, rank = map(int, sys.argv[1:])
    found = [
        {"nesterov": nesterov} | resources(kernel, capability)
        for nesterov in (False, True)
        for kernel in compiled_kernels(capability, rank, nesterov=nesterov)
    ]
    print(json.dumps(found))
