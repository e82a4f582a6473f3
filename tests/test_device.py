"""Where a process computes and what it says when memory is short; a card is stood in for by what torch answers about one."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl import SFTConfig

from qriemann import cli, device, load_base
from qriemann.config import settings_from
from qriemann.config.arguments import training_arguments
from qriemann.device import compute_device, compute_dtype, describe_device, describe_shortage, explaining_memory
from qriemann.errors import InputError, ShortMemoryError
from qriemann.memory.plan import plan
from qriemann.training.prepare import prepare
from qriemann.upstream import take_one_gpu
from tests.recipe_fixtures import run_cli, train_on

OF_CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.13 GiB is free. "
    "Including non-PyTorch memory, this process has 22.51 GiB memory in use."
)


def put_card(monkeypatch, capability, *, count=1):
    """What torch answers where there is a card; nothing can be computed on it."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: "GeForce",
        "mem_get_info": lambda *_: (20 * 2**30, 24 * 2**30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def taken_arguments(monkeypatch):
    """What the trainer's arguments are made of; they themselves are those of a CPU."""
    given = {}

    def make(**arguments):
        given.update(arguments)
        return SFTConfig(**{**arguments, "use_cpu": True, "bf16": False, "fp16": False})

    monkeypatch.setattr("qriemann.config.arguments.SFTConfig", make)
    return given


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")])
def test_a_card_computes_in_the_dtype_that_it_has_and_trainer_base_and_plan_agree(
    capability, dtype, monkeypatch, settings
):
    put_card(monkeypatch, capability)
    expected = getattr(torch, dtype)
    assert compute_dtype(torch.device("cuda")) == expected
    # transformers looks for the card itself; what is decided here is what goes into its arguments.
    given = taken_arguments(monkeypatch)
    training_arguments(settings_from(settings))
    assert (given["bf16"], given["fp16"]) == (dtype == "bfloat16", False)
    assert ("float16 is faster" in describe_device(torch.device("cuda"), expected)) == (dtype == "float32")


@pytest.mark.parametrize(
    ("written", "trainer", "base"),
    [
        ({"dtype": "float16"}, (False, True), torch.float16),
        ({"fp16": True}, (None, True), torch.float16),
        ({"dtype": "float32"}, (False, False), torch.float32),
        ({"dtype": "float32", "bf16": True}, (True, None), torch.float32),
    ],
)
def test_the_trainer_computes_in_the_dtype_that_was_asked_for(written, trainer, base, monkeypatch, settings):
    put_card(monkeypatch, (8, 9))
    given = taken_arguments(monkeypatch)
    asked = settings_from({**settings, **written})
    training_arguments(asked)
    assert (given.get("bf16"), given.get("fp16")) == trainer
    assert device.compute_dtype(torch.device("cuda"), asked.dtype or ("float16" if "fp16" in written else None)) == base


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        ((0, 1, "12.8"), None, "is a build without CUDA"),
        ((0, 1, "12.4"), "13.0", "needs a driver for CUDA 13.0, and this one serves CUDA 12.4"),
        ((803, 0, "13.0"), "13.0", "answers with error 803; restart"),
    ],
)
def test_a_driver_whose_card_torch_cannot_use_is_refused_before_anything_is_loaded(
    driver, cuda, said, monkeypatch, settings, tmp_path, capsys
):
    monkeypatch.setattr(device, "read_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert run_cli(tmp_path, settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "use_cpu: true" in line
    with pytest.raises(InputError, match="there is an NVIDIA GPU"):
        load_base(settings["model_name_or_path"], quantize=None)
    assert load_base(settings["model_name_or_path"], quantize=None, device="cpu")[0].device.type == "cpu"
    # A plan is of a card, wherever it is made.
    assert plan(settings_from({**settings, "max_length": 64})).workload.on_gpu
    prepare(settings_from({**settings, "use_cpu": True}))


@pytest.mark.parametrize("driver", [None, (100, 0, "13.0"), (34, 0, "0.0"), (0, 0, "13.0")])
def test_a_machine_without_a_card_or_with_hidden_ones_computes_on_the_cpu(driver, monkeypatch):
    monkeypatch.setattr(device, "read_driver", lambda: driver)
    assert compute_device() == torch.device("cpu")


def test_every_run_says_where_it_computes(settings, capsys):
    train_on({**settings, "max_steps": 1, "use_cpu": True}).trainer.end()
    assert "computing on the CPU, 1 threads, in float32" in capsys.readouterr().out


def test_one_process_takes_the_first_of_several_gpus(monkeypatch, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False)
    assert args.device.type == "cpu"
    args._n_gpu = 2  # as transformers counts where it finds two
    take_one_gpu(args)
    assert (args.n_gpu, args.train_batch_size) == (1, args.per_device_train_batch_size)
    put_card(monkeypatch, (8, 9), count=2)
    assert "one of 2 GPUs: CUDA_VISIBLE_DEVICES=N takes another" in describe_device(
        torch.device("cuda", 0), torch.bfloat16
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(OF_CUDA), "2.00 GiB were asked for and 1.13 GiB of 23.65 GiB were free"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."),
            "4.00 GiB",
        ),
        (MemoryError(), "no size was given"),
    ],
)
def test_an_allocation_that_fails_is_one_line(error, said):
    assert said in describe_shortage(error)
    with pytest.raises(ShortMemoryError, match=r"out of memory while loading X: .*; take less"):  # noqa: SIM117
        with explaining_memory("loading X", "take less"):
            raise error
    with pytest.raises(RuntimeError, match="another matter"), explaining_memory("loading X", "take less"):
        raise RuntimeError("another matter")


def test_memory_that_ends_in_a_training_step_names_the_cheapest_change(settings, tmp_path, capsys, monkeypatch):
    forward = LlamaDecoderLayer.forward

    def short(self, *arguments, **options):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError(OF_CUDA)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", short)
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "use_cpu": True}
    for dry_run in (True, False):
        assert run_cli(tmp_path, {**settings, **batch, "dry_run": dry_run, "overwrite": True}) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "2.00 GiB were asked for and 1.13 GiB of 23.65 GiB were free" in line
        assert "per_device_train_batch_size: 2 and gradient_accumulation_steps: 4, or auto_batch: true" in line


def test_memory_that_ends_anywhere_else_is_one_line_too(monkeypatch, capsys):
    def short(words):
        raise torch.OutOfMemoryError(OF_CUDA)

    monkeypatch.setattr("qriemann.cli.entry._run", short)
    assert cli.main(["chat", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2.00 GiB were asked for" in line


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator's mode is Linux's")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64 None"),
    ],
)
def test_the_allocator_grows_its_blocks_unless_the_user_has_set_it(variables, expected):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    code = "import os\nfrom qriemann.device import compute_device\ncompute_device('cpu')\n"
    code += f"print(*map(os.environ.get, {names}))"
    clean = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("limit", "free"),
    [("3000", 3000 - 2500 + 1200), ("max", None), (str(2**60), None)],
    ids=["in it", "none", "larger"],
)
def test_free_memory_is_within_the_containers_limit_and_cached_files_count_as_free(limit, free, monkeypatch, tmp_path):
    for name, content in {
        "max": limit,
        "current": "2500",
        "stat": "anon 9\ninactive_file 1000\nactive_file 200",
    }.items():
        (tmp_path / f"memory.{name}").write_text(f"{content}\n")
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    machine = psutil.virtual_memory().available
    found = device.free_bytes(torch.device("cpu"))
    assert found == free if free is not None else found == pytest.approx(machine, rel=0.2)
