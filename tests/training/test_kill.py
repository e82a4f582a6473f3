"""kill -9 at random moments of a training that saves every few steps: nothing is lost but time."""

from __future__ import annotations

import multiprocessing
import os
import random
import time

import pytest
import torch
from safetensors.torch import load_file

from qriemann.training.checkpoints import find_content_defect, newest_checkpoint
from tests.training.runs import protected_trainer

# Children of one server that has imported everything: a new process costs no import, and inherits no thread.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["tests.training.runs", "tests.training.test_kill"])


def train_to_the_end(folder, steps):
    """What a script does: goes on from the newest checkpoint, if there is one."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    found = newest_checkpoint(folder).path
    settings = {"max_steps": steps, "save_steps": 2, "save_total_limit": 2, "lora": {"lora_dropout": 0.2}}
    trainer, _ = protected_trainer(folder, **settings)
    trainer.train(resume_from_checkpoint=found and str(found))


def ends_within(folder, steps, seconds=None) -> bool:
    """Whether the run came to its end before it was killed."""
    child = forkserver.Process(target=train_to_the_end, args=(folder, steps))
    child.start()
    child.join(seconds)
    killed = child.is_alive()
    child.kill()
    child.join()
    assert killed or child.exitcode == 0
    return not killed


def final(folder, steps) -> dict[str, torch.Tensor]:
    """Everything that the checkpoint of the last step holds."""
    checkpoint = newest_checkpoint(folder).path
    assert checkpoint.name == f"checkpoint-{steps}"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    tensors = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
    return tensors | load_file(checkpoint / "adapter_model.safetensors")


def kill_runs(tmp_path, kills, steps, seed) -> dict[str, float]:
    """Kills runs at random moments until so many were; every run is taken to its end, which is the truth's to the bit."""
    assert ends_within(tmp_path / "warm-up", 1)
    began = time.perf_counter()
    assert ends_within(tmp_path / "truth", steps)
    duration = time.perf_counter() - began
    truth = final(tmp_path / "truth", steps)
    moments = random.Random(seed)
    counts = {"kills": 0, "unfinished saves": 0, "runs": 0, "seconds of one run": round(duration, 2)}
    began = time.perf_counter()
    while counts["kills"] < kills:
        counts["runs"] += 1
        folder = tmp_path / f"run-{counts['runs']}"
        finished = False
        while not finished:
            limit = moments.uniform(0.1, 1.0) * duration if counts["kills"] < kills else None
            finished = ends_within(folder, steps, limit)
            counts["kills"] += not finished
            found = newest_checkpoint(folder)
            counts["unfinished saves"] += bool(found.passed_over)
            assert found.path is None or find_content_defect(found.path) is None
        ours = final(folder, steps)
        assert ours.keys() == truth.keys()
        assert all(torch.equal(tensor, truth[name]) for name, tensor in ours.items())
    lost = time.perf_counter() - began - counts["runs"] * duration
    return counts | {"seconds lost a kill": round(lost / kills, 2)}


def test_a_run_killed_again_and_again_ends_as_one_that_never_was(tmp_path):
    assert kill_runs(tmp_path, kills=5, steps=8, seed=0)["kills"] == 5


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing_but_time(tmp_path):
    counts = kill_runs(tmp_path, kills=200, steps=16, seed=1)
    print(counts)
    assert counts["kills"] == 200
    # Otherwise no kill hit a save, and nothing was tested.
    assert counts["unfinished saves"] > 0
