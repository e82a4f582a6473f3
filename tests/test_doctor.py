"""`qriemann doctor` says what is wrong with a machine, and how to fix it."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from qriemann import device
from qriemann.cli import main


def lines_of(capsys) -> dict[str, str]:
    """What is said of each subject, its remedy included."""
    said: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(("ok", "wrong")):
            subject = line[6:20].strip()
            said[subject] = f"{line[:5].strip()} {line[21:]}"
        elif "->" in line:
            said[subject] += line
    return said


def test_a_machine_without_a_card_is_told_what_works(capsys, monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: [f"torch=={torch.__version__}", "nothing; extra == 'dev'"]
    )
    assert main(["doctor"]) == 0
    said = lines_of(capsys)
    assert said["versions"] == "ok 1 of 1 packages within the tested ones"
    assert said["card"].startswith("ok none that torch can use: the CPU")
    assert "every command" in said["works here"]
    assert "4-bit weights work on cpu" in said["bitsandbytes"]


def test_a_card_that_torch_cannot_use_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(device, "read_driver", lambda: (0, 1, "12.8"))
    assert main(["doctor"]) == 1
    assert lines_of(capsys)["driver"].startswith("wrong NVIDIA's, for CUDA up to 12.8; 1 GPUs")


@pytest.mark.parametrize(
    ("requirement", "remedy"),
    [("torch>=99", 'pip install "torch>=99"'), ("no-such-package>=1", 'pip install "no-such-package>=1"')],
)
def test_a_version_that_was_not_tested_is_wrong(requirement, remedy, capsys, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: [requirement])
    assert main(["doctor"]) == 1
    assert f"-> {remedy}" in capsys.readouterr().out


def test_a_cache_on_a_full_disk_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5e8})())
    assert main(["doctor"]) == 1
    assert "set HF_HUB_CACHE to a larger disk" in lines_of(capsys)["model cache"]
