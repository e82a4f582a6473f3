"""Checkpoints after a crash: any damage to any file of one is found before it is resumed from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from qriemann.checkpoints.manifest import MANIFEST, find_content_defect, newest_checkpoint
from tests.fuzz import at_length, damage, damages, hostile_input
from tests.runs import protected_trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer, _ = protected_trainer(folder, max_steps=1)
    trainer.train()
    return folder / "checkpoint-1"


def read_damaged_checkpoint(tmp_path, checkpoint, name, broken):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    damaged = Path(shutil.copytree(checkpoint, run / checkpoint.name))
    path = damaged / name
    content = path.read_bytes()
    path.write_bytes(damage(content, *broken[:2], cut=broken[2]))
    intact = path.read_bytes() == content
    with hostile_input(run):
        found = newest_checkpoint(run)
        # A manifest of the same meaning may be other bytes: spaces, say.
        assert (found.path is not None) == intact or name == MANIFEST
        # What a stranger's manifest would vouch for.
        assert "\n" not in (find_content_defect(damaged) or "")


damaged_checkpoints = {
    "name": st.sampled_from(
        ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST]
    ),
    "broken": damages,
}
test_any_damage_to_a_checkpoint_is_found, test_10_000_damaged_checkpoints = at_length(
    read_damaged_checkpoint, damaged_checkpoints
)
