"""The same recipe in two processes over gloo, beside one process with the same effective batch.

This file is also what the two processes run: each trains every case and leaves what it ended in.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from qriemann.checkpoints.signals import StoppedBySignal
from qriemann.errors import InputError
from qriemann.training import train
from qriemann.training.seam import OptimizerFactory
from tests.models import tiny_llama, with_lora
from tests.recipe_fixtures import chat_rows, train_on
from tests.runs import outcome

REPOSITORY = Path(__file__).parents[2]
PROCESSES = 2
STEPS = 4


class Poison(TrainerCallback):
    """Makes the loss of the second step infinite in one process, and leaves its gradient finite."""

    def __init__(self, rank: int) -> None:
        self.rank, self.armed = rank, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == self.rank:
            kwargs["model"].get_base_model().model.norm.register_forward_hook(self.spoil)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.armed = state.global_step == 1

    def spoil(self, module: Any, inputs: Any, output: Any) -> Any:
        # Log-probabilities of about 1e37, whose sum over the tokens is no float32 any more.
        return output + (5e37 * output).detach() if self.armed and module.training else output


class ShortMemory(TrainerCallback):
    """Room for two rows at once in one process, and for more in the other."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == args.world_size - 1:
            kwargs["model"].get_base_model().model.layers[0].register_forward_pre_hook(self.check)

    def check(self, module: Any, inputs: Any) -> None:
        if module.training and len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class TerminateOne(TrainerCallback):
    """SIGTERM in the second step, to one process alone."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run(settings: dict[str, Any], name: str, *, processes: int, **changes: Any) -> dict[str, Any]:
    """Trains and returns everything the run ended in."""
    folder = Path(settings["root"]) / f"{name}-of-{processes}"
    values = {
        "model_name_or_path": settings["model"],
        "dataset_name": settings["rows"],
        "output_dir": str(folder),
        "quantize": "nf4",
        # DDP makes the factors equal; the offset and the core at S = I are ours to keep equal.
        "start": "offset",
        "lora_r": 8,
        "lora_dropout": 0.0,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "loss_on": "all",
        # In two processes the last batch of one row is one process' alone.
        "eval_size": 5,
        "per_device_eval_batch_size": 2,
        "eval_steps": 2,
        "save_steps": STEPS,
        "logging_steps": 1,
        "display": "none",
        "use_cpu": True,
    }
    callbacks = changes.pop("callbacks", [])
    result = train_on({**values, **changes}, callbacks=callbacks)
    history = result.trainer.state.log_history
    return {
        "state": outcome(result.trainer),
        "losses": [record["loss"] for record in history if "loss" in record],
        "held_out": [record["eval_loss"] for record in history if "eval_loss" in record],
        "skipped": [record for record in metrics(folder) if "skipped" in record],
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_and_resume(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    try:
        run(settings, "stopped", processes=processes, callbacks=[TerminateOne()])
    except StoppedBySignal:
        return run(settings, "stopped", processes=processes, resume=True)
    raise AssertionError("the signal was lost")


def drawn_start(seed: int) -> dict[str, torch.Tensor]:
    """The point and the offset of a start that nobody gave a seed."""
    torch.manual_seed(seed)
    optimizer = OptimizerFactory()(with_lora(tiny_llama(), seed=seed), method="riemannion", lr=1e-3, start="offset")
    return {f"{p.name}.{i}": part.clone() for p in optimizer.points for i, part in enumerate((*p.point(), *p.offset))}


CASES = {
    "plain": lambda settings, processes: run(settings, "plain", processes=processes),
    "poisoned": lambda settings, processes: run(
        settings, "poisoned", processes=processes, callbacks=[Poison(processes - 1)]
    ),
    "from the gradient": lambda settings, processes: run(
        settings, "loi", processes=processes, init="loi", init_kwargs={"batches": 1}
    ),
    "cut to fit": lambda settings, processes: run(
        settings,
        "cut",
        processes=processes,
        callbacks=[ShortMemory()],
        auto_batch=True,
        per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=1,
    ),
    "resumed": run_and_resume,
}


def worker(folder: Path) -> None:
    train.publish = lambda *_, **__: None
    settings = json.loads((folder / "settings.json").read_text())
    ended = {name: case(settings, PROCESSES) for name, case in CASES.items()}
    rank = torch.distributed.get_rank()
    torch.save({**ended, "start": drawn_start(rank)}, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def settings(tmp_path_factory, model_folder):
    root = tmp_path_factory.mktemp("distributed")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(40)))
    settings = {"root": str(root), "model": str(model_folder), "rows": str(root / "rows.jsonl")}
    (root / "settings.json").write_text(json.dumps(settings))
    return settings


@pytest.fixture(scope="module")
def ranks(settings):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, settings["root"]],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank"))
    # One process prints, notes included; the resumed case is two runs.
    assert done.stdout.count("5 of 40 rows") == len(CASES) + 1
    return [torch.load(Path(settings["root"]) / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
def test_factors_and_momentum_are_equal_to_the_bit_in_all_processes(ranks, case):
    first, second = (rank[case]["state"] for rank in ranks)
    assert any(name.endswith("momentum") for name in first)
    assert any(name.endswith("offset_s") for name in first)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("case", ["plain", "poisoned", "cut to fit"])
def test_two_processes_have_the_losses_of_one_with_the_same_effective_batch(ranks, settings, case):
    one = CASES[case](settings, 1)
    assert len(one["losses"]) == STEPS - len(one["skipped"])
    # Other rows have a loss that differs by 1e-2.
    assert ranks[0][case]["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert ranks[0][case]["held_out"] == pytest.approx(one["held_out"], abs=1e-4)


def test_a_step_whose_loss_is_infinite_in_one_process_is_skipped_by_all_and_its_rows_are_named(ranks, settings):
    (event,) = ranks[0]["poisoned"]["skipped"]
    (alone,) = [record for record in metrics(Path(settings["root"]) / "poisoned-of-1") if "skipped" in record]
    assert (event["step"], event["skipped"]["rows"]) == (2, alone["skipped"]["rows"])
    assert len(set(alone["skipped"]["rows"])) == 8


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_resumed_run_is_the_whole_one(ranks, settings):
    assert (Path(settings["root"]) / "stopped-of-2" / "checkpoint-2" / "manifest.json").exists()
    for rank in ranks:
        for name, tensor in rank["plain"]["state"].items():
            assert torch.equal(tensor, rank["resumed"]["state"][name]), name


def test_processes_that_were_seeded_apart_start_from_one_point(ranks):
    first, second = (rank["start"] for rank in ranks)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_a_launcher_that_shards_is_refused_by_name(monkeypatch, settings, variable, name):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=f"{name} .*splits .*accelerate launch --multi_gpu") as refused:
        run(settings, "refused", processes=1)
    assert len(str(refused.value).splitlines()) == 1
    assert not (Path(settings["root"]) / "refused-of-1").exists()
    with pytest.raises(InputError, match=name):
        drawn_start(0)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
