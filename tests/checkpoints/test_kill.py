"""kill -9 at random moments of a training that saves every few steps: the same command goes on, and only time is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time

import pytest
import torch
import yaml

from qriemann import cli
from qriemann.checkpoints.manifest import newest_checkpoint
from qriemann.training import train
from tests.checkpoints.test_interruption import assert_ends_alike

# Children of one server that has imported everything: a new process costs no import, and inherits no thread.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["tests.runs", "tests.checkpoints.test_kill"])


@pytest.fixture
def settings(settings):
    """All that a resumed run has to take up again: start, packed rows, dropout, a step's several batches."""
    return {
        **settings,
        "init": "loi",
        "init_kwargs": {"batches": 2},
        "lora_dropout": 0.2,
        "packing": True,
        "max_length": 64,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_size": 0,
    }


def train_to_the_end(path):
    """`qriemann train PATH --resume auto`, but for the report at the end, which is seconds of drawing."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    # As in a process of its own: a worker from another server would load everything once more, and outlive its run.
    multiprocessing.set_start_method("fork", force=True)
    train.publish = lambda *_, **__: None
    sys.exit(cli.main(["train", str(path), "--resume", "auto"]))


def ends_within(folder, settings, seconds=None) -> bool:
    """Whether the run came to its end before it was killed."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(folder)}))
    child = forkserver.Process(target=train_to_the_end, args=(path,))
    child.start()
    child.join(seconds)
    killed = child.is_alive()
    child.kill()
    child.join()
    assert killed or child.exitcode == 0
    return not killed


def kill_runs(tmp_path, settings, kills, steps, seed) -> dict[str, float]:
    """Kills runs at random moments until so many were; every run is taken to its end, which is the truth's to the bit."""
    assert ends_within(tmp_path / "warm-up", {**settings, "max_steps": 1})
    settings = {**settings, "max_steps": steps}
    began = time.perf_counter()
    assert ends_within(tmp_path / "truth", settings)
    duration = time.perf_counter() - began
    moments = random.Random(seed)
    counts = {"kills": 0, "kills before the first save": 0, "unfinished saves": 0, "runs": 0}
    counts["seconds of one run"] = round(duration, 2)
    began = time.perf_counter()
    while counts["kills"] < kills:
        counts["runs"] += 1
        folder = tmp_path / f"run-{counts['runs']}"
        finished = False
        while not finished:
            limit = moments.uniform(0.1, 1.0) * duration if counts["kills"] < kills else None
            fresh, at = not folder.exists(), time.perf_counter()
            finished = ends_within(folder, settings, limit)
            if fresh and finished:
                # The machine was busier when the truth was made; most moments would come too late.
                duration = min(duration, time.perf_counter() - at)
            counts["kills"] += not finished
            found = newest_checkpoint(folder)
            # It looks into every file, too.
            counts["unfinished saves"] += bool(found.passed_over)
            counts["kills before the first save"] += found.path is None
        assert newest_checkpoint(folder).path.name == f"checkpoint-{steps}"
        assert_ends_alike(folder, tmp_path / "truth")
    lost = time.perf_counter() - began - counts["runs"] * duration
    return counts | {"seconds lost per kill": round(lost / kills, 2)}


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_never_was(tmp_path, settings):
    assert kill_runs(tmp_path, settings, kills=5, steps=8, seed=0)["kills"] == 5


@pytest.mark.soak
def test_two_hundred_kills_lose_nothing_but_time(tmp_path, settings):
    # Workers outlive a killed run by seconds.
    counts = kill_runs(tmp_path, {**settings, "dataloader_num_workers": 1}, kills=200, steps=16, seed=1)
    print(counts)
    assert counts["kills"] == 200
    # Otherwise no kill hit a save, and nothing was tested.
    assert counts["unfinished saves"] > 0
    assert counts["kills before the first save"] > 0
