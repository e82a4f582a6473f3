"""A checkpoint counts when it is whole, and whatever fails while one is saved leaves one that counts."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path

import peft.peft_model
import pytest
import torch
from safetensors.torch import load_file, save_file

from qriemann.checkpoints.manifest import (
    MANIFEST,
    commit,
    find_content_defect,
    find_defect,
    newest_checkpoint,
    read_manifest,
    rotate,
)
from qriemann.errors import InputError
from qriemann.geometry.parameter import fixed_rank_parameters
from tests.models import edit_json
from tests.runs import protected_trainer


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


def test_the_newest_is_the_one_completed_last_and_not_the_one_of_the_highest_step(run):
    # A run that went on from step 1 once more, with other save_steps.
    trainer, _ = protected_trainer(run, max_steps=2, save_steps=5, save_total_limit=2)
    (run / "checkpoint-2").rename(run / "checkpoint-9")
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert newest_checkpoint(run).path == run / "checkpoint-2"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-9"}


def test_code_in_a_pickle_is_not_run(run):
    ran = run / "ran"

    class Touch:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"state": Touch()}, run / "checkpoint-2" / "optimizer.pt")
    assert "optimizer.pt" in find_content_defect(run / "checkpoint-2")
    assert not ran.exists()


def test_a_point_that_left_the_manifold_stops_the_run_and_is_not_completed(run):
    trainer, _ = protected_trainer(run, max_steps=4, protection={"allow": ["max_steps"]})
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


@pytest.mark.parametrize("spoil", ["lora_A", "lm_head", "exp_avg"])
def test_what_is_not_finite_after_a_step_of_any_method_is_never_a_checkpoint(tmp_path, spoil):
    # Plain LoRA factors and a trained head, none of which is a point.
    trainer, _ = protected_trainer(tmp_path, method="adamw", lora={"modules_to_save": ["lm_head"]}, max_steps=2)
    trainer.create_optimizer()

    def spoil_one(optimizer, args, kwargs):
        if spoil == "exp_avg":
            next(iter(optimizer.state.values()))["exp_avg"][0, 0] = torch.inf
        else:
            next(p for n, p in trainer.model.named_parameters() if spoil in n and p.requires_grad).data[0, 0] = (
                torch.nan
            )

    trainer.optimizer.register_step_post_hook(spoil_one)
    with pytest.raises(InputError, match=rf"must be finite.*in .*{spoil}.* at step 1; .* holds no complete checkpoint"):
        trainer.train()
    assert newest_checkpoint(tmp_path).path is None


def sign(folder: Path) -> None:
    """Writes a manifest that fits whatever the folder holds."""
    commit(folder, int(folder.name.rpartition("-")[2]), read_manifest(folder)["run"])


def edit_optimizer(folder: Path, change) -> None:
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "optimizer.pt")


def spoil_factors(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path)


def resigned(spoil):
    """The damage with a manifest that fits it, as a stranger may write it."""
    return lambda folder: (spoil(folder), sign(folder))


# Other changes of single bytes: test_damage.py.
DAMAGE = {
    "its save was not finished": lambda folder: (folder / MANIFEST).unlink(),
    "adapter_model.safetensors has no bytes": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "optimizer.pt has 1000 bytes": lambda folder: os.truncate(folder / "optimizer.pt", 1000),
    "adapter_model.safetensors must hold finite": resigned(spoil_factors),
    "not finite in state.0.momentum": resigned(
        lambda folder: edit_optimizer(folder, lambda content: content["state"][0]["momentum"].fill_(torch.nan))
    ),
    "trainer_state.json has the step 'x'": resigned(
        lambda folder: edit_json(folder / "trainer_state.json", global_step="x")
    ),
}


@pytest.mark.parametrize(("named", "spoil"), DAMAGE.items(), ids=DAMAGE.keys())
def test_the_newest_checkpoint_that_can_be_resumed_is_taken_and_the_others_are_named(run, named, spoil):
    assert newest_checkpoint(run).path == run / "checkpoint-2"
    spoil(run / "checkpoint-2")
    found = newest_checkpoint(run)
    assert found.path == run / "checkpoint-1"
    (line,) = found.passed_over
    assert line.startswith("checkpoint-2: ")
    assert named in line


def test_a_step_that_the_run_cannot_have_taken_is_refused(run):
    edit_json(run / "checkpoint-1" / "trainer_state.json", global_step=10**9)
    with pytest.raises(InputError, match="got step 1000000000") as caught:
        protected_trainer(run, max_steps=2)[0].train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert "\n" not in str(caught.value)


def test_deletion_leaves_alone_what_a_link_leads_to(run, tmp_path):
    archive = tmp_path / "archive"
    (run / "checkpoint-1").rename(archive)
    (run / "checkpoint-1").symlink_to(archive)
    before = {path.name: path.read_bytes() for path in archive.iterdir()}
    assert rotate(run, 1) == []
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert {path.name: path.read_bytes() for path in archive.iterdir()} == before


def test_checkpoints_of_weights_alone_do_not_displace_the_last_to_go_on_from(run):
    protection = {"allow": ["max_steps"]}
    settings = {"max_steps": 5, "save_total_limit": 2, "save_only_model": True}
    trainer, _ = protected_trainer(run, protection=protection, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    assert newest_checkpoint(run).path == run / "checkpoint-2"
    assert "save_only_model" in find_defect(run / "checkpoint-5")


def test_a_deletion_that_fails_is_told_and_does_not_stop_the_run(run, monkeypatch):
    lines = []
    protection = {"note": lines.append, "allow": ["max_steps"]}
    trainer, _ = protected_trainer(run, max_steps=3, save_total_limit=2, protection=protection)

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
        for module, name in ((torch, "save"), (peft.peft_model, "safe_save_file")):
            monkeypatch.setattr(module, name, self.halfway(getattr(module, name)))
        opened = self.opener(io.open)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr("builtins.open", opened)

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
