"""Every kernel compiled for cards that are not here: it fits, it hardly spills, and no product is in TF32."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# What the smallest of these cards gives one program, and the registers of one multiprocessor.
SHARED_BYTES, REGISTERS = 99 * 1024, 65536
# Bytes that a thread may spill; recipes/results/README.md has the measured ones. The most are those of the core kernel, which
# at rank 128 holds as much as a multiprocessor has registers.
SPILLED_BYTES = {8: 0, 16: 0, 32: 484, 64: 184, 128: 1220}
# The default rank on a common card takes 25 s of one core, all of them half an hour.
CASES = [
    pytest.param(rank, capability, marks=pytest.mark.slow if (rank, capability) == (16, 89) else pytest.mark.soak)
    for rank in SPILLED_BYTES
    for capability in (80, 86, 89, 90, 120)
]


@pytest.mark.parametrize(("rank", "capability"), CASES)
def test_every_kernel_fits_a_card(rank, capability, pytestconfig):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.triton.offline", str(capability), str(rank)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=pytestconfig.rootpath, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert {kernel["name"] for kernel in kernels} == {
        f"{name}_kernel" for name in ("gram", "core", "apply", "finish", "correct")
    }
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["registers"] * kernel["threads"] <= REGISTERS, kernel
        assert kernel["spilled"] <= SPILLED_BYTES[rank], kernel
        assert not kernel["tf32"], kernel
