"""The parts of `measure on_a_card` that ask what a run costs on a card: memory, launches, time."""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_step
import bench_train
import torch
from card_model import Report, big_config, byte_tokenizer, llama_config, random_4bit, token_rows
from contenders import ENTRIES, Gradients, adapter_shapes
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

import qriemann
from qriemann.base.host_embedding import keep_embeddings_on_host
from qriemann.config import settings_from
from qriemann.device import compute_dtype
from qriemann.memory.auto_batch import AUTO_BATCH_KEY
from qriemann.memory.live_bytes import CONTEXT, GIB
from qriemann.training.check import check

_REPOSITORY = Path(__file__).parents[2]


def memory(report: Report) -> None:
    """The plan of an 8B shape against what torch allocates and reserves; the automatic batch, and one that is cut short."""
    config, length = big_config(report.small), 64 if report.small else 2048
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(Path(folder) / "base")
        usual = {
            "model_name_or_path": str(Path(folder) / "base"),
            "output_dir": str(Path(folder) / "out"),
            "max_length": length,
            "display": "none",
            "eval_strategy": "no",
            "save_strategy": "no",
            "use_cpu": report.device.type == "cpu",
        }
        held_out = {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 2}
        batches = (1, 2) if report.small else (1, 2, 4, 8)
        cases: list[dict[str, Any]] = [{"per_device_train_batch_size": rows} for rows in batches]
        cases += [{"per_device_train_batch_size": 4, "lengths": [length, length // 4]}]
        cases += (
            [{"per_device_train_batch_size": 1, "offload_embeddings": True}] if report.device.type == "cuda" else []
        )
        cases += [{"per_device_train_batch_size": 1, **held_out}]
        for changes in cases:
            _plan_and_measure(report, config, {**usual, **changes})
        _automatic_batch(report, config, {**usual, "per_device_train_batch_size": 8, "max_steps": 3})


def _prepared(report: Report, config: Any, settings: dict[str, Any]) -> Any:
    """A base made in place with its rows, ready to be checked or trained."""
    lengths = settings.pop("lengths", [settings["max_length"]])
    model = random_4bit(config, report.device, compute_dtype(report.device))
    if settings.get("offload_embeddings"):
        keep_embeddings_on_host(model, "random")
    # Tokens that the little tokenizer knows, whatever the model's vocabulary.
    rows = token_rows(3 * settings["per_device_train_batch_size"], lengths, len(byte_tokenizer()))
    evaluated = rows if settings["eval_strategy"] != "no" else None
    asked = settings_from({**settings, "eval_size": 0, "allow": ["end-never-trained", "all"]})
    given = {"model": model, "tokenizer": byte_tokenizer(), "train_dataset": rows, "eval_dataset": evaluated}
    return qriemann.prepare(asked, **given)


def _plan_and_measure(report: Report, config: Any, settings: dict[str, Any]) -> None:
    _forget()
    rows, length = settings["per_device_train_batch_size"], settings["max_length"]
    what = f"{rows} x {length}" + ", padded" * ("lengths" in settings)
    what += ", embeddings offloaded" * bool(settings.get("offload_embeddings"))
    what += ", with evaluation" * (settings["eval_strategy"] != "no")
    planned = qriemann.plan(settings_from({k: v for k, v in settings.items() if k != "lengths"}))
    prepared = _prepared(report, config, dict(settings))
    figures: dict[str, Any] = {"planned_gib": planned.peak / GIB, "low": planned.low / GIB, "high": planned.high / GIB}
    if report.device.type == "cuda":
        held = sum(size for name, size in planned.stored if "4-bit" in name or "not quantized" in name)
        figures["base_gib"] = {"planned": held / GIB, "allocated": torch.cuda.memory_allocated() / GIB}
    found = check(prepared, console=Console(quiet=True))
    batches = [batch for batch in (found.training, found.evaluation) if batch is not None]
    figures |= {
        "peak_gib": max(batch.peak_gib for batch in batches),
        "card_gib": max(batch.card_gib for batch in batches),
    }
    figures |= {"seconds": found.training.seconds, "step_seconds": found.step_seconds}
    # The resident memory of a process on the CPU is not what the plan counts.
    right = None
    if report.device.type == "cuda":
        right = planned.low <= figures["peak_gib"] * GIB + CONTEXT <= planned.high
        free, total = torch.cuda.mem_get_info()
        figures["context_gib"] = (total - free - torch.cuda.memory_reserved()) / GIB
    report.tell(f"plan of {what}", figures, right=right)


class _Shrink(TrainerCallback):
    """Leaves too little memory for the chosen rows at once, before the second step."""

    def __init__(self, report: Report) -> None:
        self.report, self.model = report, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        if self.report.device.type == "cuda":
            torch.cuda.empty_cache()
            needed = state.stateful_callbacks[AUTO_BATCH_KEY]["needed_gib"] * GIB
            left = torch.cuda.memory_allocated() + 0.6 * needed
            torch.cuda.set_per_process_memory_fraction(left / torch.cuda.mem_get_info()[1])
            return
        layer, rows = kwargs["model"].get_base_model().model.layers[0], state.stateful_callbacks[AUTO_BATCH_KEY]["rows"]

        def short(module: Any, inputs: Any) -> None:
            if inputs[0].shape[0] == rows:
                handle.remove()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        handle = layer.register_forward_pre_hook(short)


def _automatic_batch(report: Report, config: Any, settings: dict[str, Any]) -> None:
    _forget()
    if report.device.type == "cuda":
        # A card of 24 GiB.
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * GIB / torch.cuda.mem_get_info()[1]))
    prepared = _prepared(report, config, {**settings, "auto_batch": True})
    qriemann.train(prepared, callbacks=[_Shrink(report)])
    fit = json.loads((Path(settings["output_dir"]) / "run.json").read_text("utf-8"))["auto_batch"]
    report.tell("auto_batch, cut short before the second step", fit, right=fit["fallbacks"] >= 1)
    if report.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)


def speed(report: Report) -> None:
    """Tokens a second against stock TRL, and where the time of a microbatch goes."""
    small = report.small
    bench_train.SHAPES["on-a-card"] = {
        key: big_config(small).to_dict()[key]
        for key in bench_train.SHAPES["llama-3.1-8b"]
        if key != "num_hidden_layers"
    } | {"num_hidden_layers": 2 if small else 8}
    for rows, length in ((2, 32), (1, 16)) if small else ((8, 2048), (1, 512)):
        words = f"--model on-a-card --batch {rows} --length {length} --device {report.device.type}"
        words += f" --steps {3 if small else 8} --warmup {1 if small else 2} --rank {4 if small else 16}"
        for name, record in bench_train.run(_options(bench_train, words))["results"].items():
            kept = ("tokens_per_s", "speed_ratio", "peak_gib", "optimizer_share", "reason")
            figures = {key: record[key] for key in kept if key in record}
            report.tell(f"{rows * length} tokens a step, {name}", figures, right=record["ran"])
    config = big_config(small, 2 if small else 8)
    model = random_4bit(config, report.device, compute_dtype(report.device))
    model.enable_input_require_grads()
    peft = get_peft_model(model, LoraConfig(r=4 if small else 16, target_modules="all-linear", task_type="CAUSAL_LM"))
    qriemann.attach(peft, seed=0)
    ids = torch.randint(2, config.vocab_size, (1, 32 if small else 512), device=report.device)

    def microbatch() -> None:
        peft(input_ids=ids, labels=ids).loss.backward()

    with_adapter = _profiled(microbatch, report.device)
    with peft.disable_adapter():
        without = _profiled(microbatch, report.device)
    report.tell("one microbatch with the adapter", with_adapter)
    report.tell("one microbatch without", without)
    report.tell("share of the adapter", 1 - without["wall_ms"] / with_adapter["wall_ms"])


def _profiled(body: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Median wall clock, kernel launches (operations on a CPU) and the share of the time in which the card is idle."""
    on_card = device.type == "cuda"

    def timed() -> float:
        if on_card:
            torch.cuda.synchronize()
        started = time.perf_counter()
        body()
        if on_card:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - started)

    timed()
    wall = sorted(timed() for _ in range(5))[2]
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]) as profiler:
        body()
        if on_card:
            torch.cuda.synchronize()
    events = profiler.events()
    if not on_card:
        return {"wall_ms": wall, "operations": sum(event.name.startswith("aten::") for event in events)}
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e3
    launches = sum(bool(re.match(r"cu(da)?LaunchKernel", event.name)) for event in events)
    return {"wall_ms": wall, "launches": launches, "busy_ms": busy, "idle": max(0.0, 1 - busy / wall)}


def step(report: Report) -> None:
    """The optimizer's step alone, torch's operations against Triton's kernels, and the decompositions in it."""
    names = ["riemannion-offset", "riemannion-triton", "adamw-fused"]
    model, layers = ("smollm2-135m", 2) if report.small else ("llama-3.1-8b", 32)
    for rank in (4,) if report.small else (16, 32, 64):
        words = (
            f"--model {model} --layers {layers} --rank {rank} --device {report.device.type} --only {','.join(names)}"
        )
        words += f" --rounds {3 if report.small else 9} --warmup 2"
        for name, record in bench_step.run(_options(bench_step, words))["results"].items():
            kept = ("median_ms", "ratio_of_medians", "launches", "synchronizations", "reason")
            # The kernels need a card.
            right = True if record["ran"] else None if report.small else False
            report.tell(f"rank {rank}, {name}", {key: record[key] for key in kept if key in record}, right=right)
        _forget()
        report.tell(f"rank {rank}: decompositions of a step", _decompositions(model, layers, rank, report.device))


def _decompositions(model: str, layers: int, rank: int, device: torch.device) -> dict[str, int]:
    """How often each of linear algebra's operations runs in the second step of Riemannion."""
    shapes = adapter_shapes(model, layers)
    contender = ENTRIES["riemannion-offset"].build(shapes, rank, device)
    gradients = Gradients(shapes, rank, device, seed=1)
    for turn in range(2):
        gradients.leave(contender.pairs, turn)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            contender.optimizer.step()
    return dict(
        Counter(event.name for event in profiler.events() if re.match(r"aten::(_?linalg|cholesky)", event.name))
    )


def starts(report: Report) -> None:
    """A locally optimal start, and the tests of the kernels."""
    config = llama_config(64, 2) if report.small else big_config(small=False, layers=8)
    model = random_4bit(config, report.device, compute_dtype(report.device))
    model.enable_input_require_grads()
    peft = get_peft_model(
        model, LoraConfig(r=4 if report.small else 16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    batch = torch.tensor(
        token_rows(2, [32 if report.small else 512], config.vocab_size)["input_ids"], device=report.device
    )
    with torch.no_grad():
        before = peft(input_ids=batch).logits.float()
    started = time.perf_counter()
    points = qriemann.locally_optimal_(peft, [{"input_ids": batch, "labels": batch}] * 2)
    if report.device.type == "cuda":
        torch.cuda.synchronize()
    report.tell("locally optimal start: seconds", time.perf_counter() - started)
    with torch.no_grad():
        apart = ((peft(input_ids=batch).logits.float() - before).norm() / before.norm()).item()
    report.tell("locally optimal start: change of the logits", apart, at_most=3e-2)
    eye = torch.eye(points[0].rank, device=report.device)
    drift = max((f.mT @ f - eye).abs().max().item() for point in points for f in (point.point().u, point.point().v))
    report.tell("locally optimal start: orthonormality", drift, at_most=1e-4)
    _forget()
    # On a CPU they are the slow interpreter's; that they are found is all that a rehearsal asks.
    words = ["-m", "gpu"] if report.device.type == "cuda" else ["--collect-only"]
    command = [sys.executable, "-m", "pytest", "-q", *words, "tests/ops/triton"]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    report.tell("the kernels' tests", done.stdout.strip().splitlines()[-1:], right=done.returncode == 0)


def _options(module: Any, words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words.split())


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
