"""Triton stays optional: what is said where it cannot run, and that nothing imports it unasked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qriemann.ops.triton import MAX_RANK, supported


def test_a_cpu_without_the_interpreter_is_refused_with_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert supported("cpu", 16) == "the Triton kernels need a CUDA device, got cpu"


def test_a_rank_above_the_limit_is_refused_with_a_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert supported("cpu", MAX_RANK) is None
    assert supported("cpu", MAX_RANK + 1) == "the Triton kernels go up to rank 128, got 129"


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = supported("cpu", 16)
    assert reason is not None
    assert reason.startswith("triton cannot be imported")


@pytest.mark.parametrize(("capability", "accepted"), [((6, 1), False), ((7, 0), True), ((12, 0), True)])
def test_old_gpus_are_refused_by_name(monkeypatch, capability, accepted):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 1080")
    reason = supported("cuda", 16)
    assert (reason is None) == accepted
    if not accepted:
        assert reason == "the Triton kernels need compute capability 7.0, GeForce GTX 1080 has 6.1"


def test_importing_the_operations_does_not_import_triton():
    code = "import sys, torch; before = 'triton' in sys.modules; import qriemann.ops, qriemann.ops.triton; "
    code += "sys.exit(not before and 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
