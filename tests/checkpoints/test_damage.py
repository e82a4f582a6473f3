"""Checkpoints after a crash: any damage to any file of one is found before it is resumed from."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qriemann.checkpoints.manifest import MANIFEST, find_content_defect, newest_checkpoint
from qriemann.errors import InputError
from tests.runs import protected_trainer

# Seconds that one reading may take, on a clock that goes on while it waits; nothing here is longer than a few kB.
PATIENCE = 5.0
damaged_checkpoints = {
    "name": st.sampled_from(
        ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST]
    ),
    # Where a file is changed, as a share of its length; the beginning is where headers are.
    "place": st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.0001, 0.001, 0.01]),
    "change": st.binary(max_size=64),
    "cut": st.booleans(),
}
quiet: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer, _ = protected_trainer(folder, max_steps=1)
    trainer.train()
    return folder / "checkpoint-1"


class Hang(BaseException):
    """A reading that took too long; no reader's `except Exception` takes it for bad input."""


@contextmanager
def hostile_input(folder: Path) -> Iterator[None]:
    """Lets InputError of one line pass; fails for any other, for a long wait, and for a change beside the folder."""

    def give_up(*_: Any) -> None:
        raise Hang(f"longer than {PATIENCE} s")

    said, around = "", {path for path in folder.parent.iterdir() if path != folder}
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    except InputError as error:
        said = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "\n" not in said
    assert {path for path in folder.parent.iterdir() if path != folder} == around


def read_damaged_checkpoint(tmp_path: Path, checkpoint: Path, name: str, place: float, change: bytes, cut: bool):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    damaged = Path(shutil.copytree(checkpoint, run / checkpoint.name))
    content = (damaged / name).read_bytes()
    at = int(place * len(content))
    broken = content[:at] + change + (b"" if cut else content[at + len(change) :])
    (damaged / name).write_bytes(broken)
    with hostile_input(run):
        found = newest_checkpoint(run)
        # A manifest of the same meaning may be other bytes: spaces, say.
        assert (found.path is not None) == (broken == content) or name == MANIFEST
        # What a stranger's manifest would vouch for.
        assert "\n" not in (find_content_defect(damaged) or "")


# The few are the same in every run, so that a change is blamed for what it did; the many search.
@settings(max_examples=60, derandomize=True, **quiet)
@given(**damaged_checkpoints)
def test_any_damage_to_a_checkpoint_is_found(tmp_path, checkpoint, name, place, change, cut):
    read_damaged_checkpoint(tmp_path, checkpoint, name, place, change, cut)


@pytest.mark.soak
@settings(max_examples=10_000, **quiet)
@given(**damaged_checkpoints)
def test_10_000_damaged_checkpoints(tmp_path, checkpoint, name, place, change, cut):
    read_damaged_checkpoint(tmp_path, checkpoint, name, place, change, cut)
