"""A checkpoint counts when it is whole, and whatever fails while one is saved leaves one that counts."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from qriemann.errors import InputError
from qriemann.geometry.parameter import fixed_rank_parameters
from qriemann.training.checkpoints import MANIFEST, find_content_defect, find_defect, newest_checkpoint
from tests.training.runs import protected_trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run's folder with checkpoint-1 and checkpoint-2, both complete."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, _ = protected_trainer(folder, max_steps=2)
    trainer.train()
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a manifest that was never written": lambda folder: (folder / MANIFEST).unlink(),
    "a manifest cut short": lambda folder: (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-9]),
    "a file cut short": lambda folder: os.truncate(folder / "optimizer.pt", 1000),
    "a file that is gone": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "one bit": lambda folder: flip_a_byte(folder / "adapter_model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_the_newest_checkpoint_that_verifies_is_taken_and_the_others_are_named(run, damage):
    assert newest_checkpoint(run).path == run / "checkpoint-2"
    damage(run / "checkpoint-2")
    found = newest_checkpoint(run)
    assert found.path == run / "checkpoint-1"
    assert len(found.passed_over) == 1
    assert found.passed_over[0].startswith("checkpoint-2: ")


def test_the_newest_is_the_one_completed_last_and_not_the_one_of_the_highest_step(run):
    # A run that went on from step 1 once more, with other save_steps.
    trainer, _ = protected_trainer(run, max_steps=2, save_steps=5, save_total_limit=2)
    (run / "checkpoint-2").rename(run / "checkpoint-9")
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert newest_checkpoint(run).path == run / "checkpoint-2"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-9"}


def test_a_checkpoint_without_optimizer_state_does_not_count(tmp_path):
    trainer, _ = protected_trainer(tmp_path, max_steps=1, save_only_model=True)
    trainer.train()
    assert newest_checkpoint(tmp_path).path is None
    assert "optimizer.pt" in find_defect(tmp_path / "checkpoint-1") or "trainer_state" in find_defect(
        tmp_path / "checkpoint-1"
    )


def test_a_manifest_may_not_name_files_outside_of_its_folder(run):
    (run / "secret").write_text("x")
    manifest = run / "checkpoint-2" / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    manifest.write_text(json.dumps(content))
    assert "outside" in find_defect(run / "checkpoint-2")


def test_numbers_that_are_not_finite_are_found_behind_a_valid_manifest(run):
    from safetensors.torch import load_file, save_file

    path = run / "checkpoint-2" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path)
    assert name in find_content_defect(run / "checkpoint-2")


def test_code_in_a_pickle_is_not_run(run):
    ran = run / "ran"

    class Touch:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"state": Touch()}, run / "checkpoint-2" / "optimizer.pt")
    assert "optimizer.pt" in find_content_defect(run / "checkpoint-2")
    assert not ran.exists()


def test_a_point_that_left_the_manifold_stops_the_run_and_is_not_completed(run):
    trainer, _ = protected_trainer(run, max_steps=4)
    spoiled = []

    def spoil(optimizer, args, kwargs):
        point = fixed_rank_parameters(trainer.model.parameters())[0]
        if len(spoiled) == 1:
            point.u.data.mul_(1.01)
        spoiled.append(point)

    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(InputError, match=r"orthonormal.*2.0e-02 at step 4.*checkpoint-3"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert newest_checkpoint(run).path == run / "checkpoint-3"


def test_a_deletion_that_fails_is_told_and_does_not_stop_the_run(run, monkeypatch):
    lines = []
    trainer, _ = protected_trainer(run, max_steps=3, save_total_limit=2, protection={"note": lines.append})

    def refuse(path, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert lines == ["checkpoint-1 could not be deleted: Permission denied"]
    assert newest_checkpoint(run).path == run / "checkpoint-3"
    assert find_defect(run / "checkpoint-1") is not None


class Faults:
    """Counts the writes, flushes, renames and deletions inside a folder; the one of a given number fails half done."""

    def __init__(self, monkeypatch, folder: Path, fail_at: int | None, number: int = errno.ENOSPC) -> None:
        self.count, self.fail_at, self.error = 0, fail_at, OSError(number, os.strerror(number))
        self.folder = str(folder)
        for module, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "remove"), (os, "rmdir")):
            monkeypatch.setattr(module, name, self.before(getattr(module, name)))
        monkeypatch.setattr(os, "fsync", self.before(os.fsync, is_inside=lambda *args: True))
        for module, name in ((torch, "save"), self.safetensors_writer()):
            monkeypatch.setattr(module, name, self.halfway(getattr(module, name)))
        opened = self.opener(io.open)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr("builtins.open", opened)

    @staticmethod
    def safetensors_writer():
        import peft.peft_model

        return peft.peft_model, "safe_save_file"

    def due(self) -> bool:
        self.count += 1
        return self.count == self.fail_at

    def inside(self, *args) -> bool:
        # shutil.rmtree deletes by names relative to an open folder.
        return any(self.folder in str(arg) for arg in args) or not os.path.isabs(str(args[0]))

    def before(self, function, is_inside=None):
        def faulty(*args, **kwargs):
            if (is_inside or self.inside)(*args) and self.due():
                raise self.error
            return function(*args, **kwargs)

        return faulty

    def halfway(self, function):
        def faulty(content, path, *args, **kwargs):
            function(content, path, *args, **kwargs)
            if self.inside(path) and self.due():
                os.truncate(path, os.path.getsize(path) // 2)
                raise self.error

        return faulty

    def opener(self, function):
        def faulty(path, mode="r", *args, **kwargs):
            if set(mode) & set("wax+") and self.inside(path) and self.due():
                function(path, "w").close()
                raise self.error
            return function(path, mode, *args, **kwargs)

        return faulty


def test_whatever_fails_in_a_save_one_of_the_last_two_checkpoints_verifies(run, monkeypatch):
    """The save of step 3 after those of 1 and 2, of which one is kept, once for every operation that can fail."""
    trainer, _ = protected_trainer(run, max_steps=2, save_total_limit=1)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    handler = trainer.callback_handler
    trainer.state.global_step = 3

    def save() -> None:
        trainer._save_checkpoint(trainer.model, None)
        handler.on_save(trainer.args, trainer.state, trainer.control)

    template = run.parent / "template"
    shutil.copytree(run, template)
    fail_at, outcomes = 0, []
    while True:
        fail_at += 1
        shutil.rmtree(run)
        shutil.copytree(template, run)
        number = (errno.ENOSPC, errno.EACCES, errno.EINTR)[fail_at % 3]
        with monkeypatch.context() as patched:
            faults = Faults(patched, run, fail_at, number)
            try:
                save()
            except (OSError, InputError):
                outcomes.append("failed")
            else:
                outcomes.append("saved")
        if faults.count < fail_at:
            break
        found = newest_checkpoint(run)
        assert found.path is not None, fail_at
        assert found.path.name == ("checkpoint-3" if outcomes[-1] == "saved" else found.path.name)
        for path in found.path.iterdir():
            if path.suffix in (".pt", ".pth") and found.path.name == "checkpoint-2":
                assert path.read_bytes() == (template / "checkpoint-2" / path.name).read_bytes()
        assert find_content_defect(found.path) is None
    # Every file of the checkpoint is written and flushed at least once, and the old one is deleted.
    files = len(list((run / "checkpoint-3").iterdir()))
    assert len(outcomes) > 2 * files
    assert outcomes.count("failed") > files
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3"}
