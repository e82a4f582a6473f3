"""Takes the longest batches through the real model before the first step, to find out whether they fit.

A run gives the same bits with and without: gradients, random generators and the trainer's counters stay as they were.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig

from qriemann.adapters.loi import preserved_rng
from qriemann.data.defects import Defect, refuse
from qriemann.data.tokenized import TokenizedData
from qriemann.device import describe_shortage, explaining_memory, is_out_of_memory
from qriemann.folder.records import peak_gib
from qriemann.memory.live_bytes import GIB, card_bytes, count_peak
from qriemann.upstream import TrainerCounts, attention_of

# Tokens of each of two packed samples: enough for one to see the other, cheap to compute.
_PROBE_TOKENS = 32
# The logits of a sample that does not see the other differ by rounding alone.
_PROBE_RTOL = 1e-2
# Tokens of a packed batch from which its mask is worth a line: 0.1 GiB in half precision.
_LONG_ROW = 8192
# Share of padding that is worth a line; the quickstart's rows have 5 % in batches of 8, sums of numbers 17 %.
_MUCH_PADDING = 0.25


@dataclass(frozen=True)
class Measured:
    """One batch taken through the model.

    Attributes:
        rows, tokens: of the batch, and of its longest row, padding included.
        peak_gib: of the process so far: allocated on a GPU, resident on a CPU.
        card_gib: of a GPU, with what the allocator reserves beyond that and the CUDA context; 0 on a CPU.
        counted: most bytes allocated at once beyond what was held before; None if they were not counted.
    """

    rows: int
    tokens: int
    seconds: float
    peak_gib: float
    card_gib: float
    counted: int | None


class DryRun(TrainerCallback):
    """Refuses packed samples that see each other, and batches that do not fit, when a trainer's training begins."""

    def __init__(
        self,
        trainer: Any,
        data: TokenizedData,
        *,
        allow: Collection[str],
        note: Callable[[str], None],
        training_batch: bool = True,
    ) -> None:
        self.trainer, self.data, self.allow, self.note = trainer, data, allow, note
        self.training_batch = training_batch
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        defects = mixed_samples(self.trainer, self.data)
        if self.training_batch:
            measured = measure_training_batch(self.trainer)
            self.note(
                f"dry run: the longest batch, {measured.rows} rows of up to {measured.tokens} tokens, took "
                f"{measured.seconds:.1f} s, peak {measured.peak_gib:.2f} GiB"
            )
        # A CPU raises no error when memory is short, and an evaluation is slow there.
        if args.device.type == "cuda" and self.trainer.eval_dataset is not None:
            defects += measure_evaluation_batch(self.trainer)[1]
        refuse(defects, self.allow, self.note)


def make_ready(trainer: Any) -> None:
    """Does what `trainer.train` does before its first step: enables checkpointing, creates the optimizer, wraps the model."""
    if trainer.args.activation_checkpointing:
        options = dict(trainer.args.activation_checkpointing_kwargs or {})
        own = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **own)
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)


def measure_training_batch(trainer: Any, *, counted: bool = False, keep_gradients: bool = False) -> Measured:
    """Takes the longest training batch through forward and backward."""
    rows = longest_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size)

    def run(inputs: dict[str, Any]) -> None:
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.model_wrapped, inputs)

    longest = max(len(row["input_ids"]) for row in rows)
    what = f"taking the longest batch, {len(rows)} rows of up to {longest} tokens, through the model"
    with explaining_memory(what, cheapest_change(trainer.args, len(rows))):
        return measure(trainer, rows, run, counted=counted, keep_gradients=keep_gradients)


def cheapest_change(args: TrainingArguments, rows: int) -> str:
    """What to change when so many rows at once run out of memory, from what costs time alone to what changes the learning."""
    if rows > 1 and args.per_device_train_batch_size > 1:
        half = args.per_device_train_batch_size // 2
        steps = args.per_device_train_batch_size * args.gradient_accumulation_steps / half
        same = f" and gradient_accumulation_steps: {steps:.0f}" if steps == int(steps) else ""
        return f"set per_device_train_batch_size: {half}{same}, or auto_batch: true"
    if not args.activation_checkpointing:
        return "set activation_checkpointing: true"
    return "lower max_length; qriemann plan --vram finds the longest that fits"


def measure_step(trainer: Any) -> float:
    """Takes one optimizer step with the gradients of the last batch, clears them, and returns its seconds."""
    with _timed(trainer) as seconds:
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return seconds()


def measure_evaluation_batch(trainer: Any, *, counted: bool = False) -> tuple[Measured | None, list[Defect]]:
    """Takes the longest evaluation batch through the model; returns a defect if it does not fit."""
    rows = longest_rows(trainer.eval_dataset, trainer.args.per_device_eval_batch_size)

    def run(inputs: dict[str, Any]) -> None:
        trainer.model.eval()
        trainer.prediction_step(trainer.model_wrapped, inputs, prediction_loss_only=True)

    try:
        return measure(trainer, rows, run, counted=counted), []
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, [too_large("evaluation", len(rows), f"out of memory: {describe_shortage(error)}")]


def measure(
    trainer: Any,
    rows: list[dict[str, Any]],
    run: Callable[[dict[str, Any]], Any],
    *,
    counted: bool,
    keep_gradients: bool = False,
) -> Measured:
    """Calls `run` with the collated rows and undoes what it leaves behind; `run` may raise."""
    inputs, device = trainer.data_collator(rows), trainer.args.device
    if device.type == "cuda":
        # Loading the weights does not count, nor what the allocator kept of it.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    counting = count_peak(trainer.model, device) if counted else nullcontext()
    with _left_as_it_was(trainer, keep_gradients=keep_gradients), counting as count, _timed(trainer) as seconds:
        run(inputs)
    return Measured(
        rows=len(rows),
        tokens=inputs["input_ids"].shape[1],
        seconds=seconds(),
        peak_gib=peak_gib(device),
        card_gib=card_bytes(device) / GIB if device.type == "cuda" else 0.0,
        counted=count() if count else None,
    )


def mixed_samples(trainer: Any, data: TokenizedData) -> list[Defect]:
    """The defect that a packed sample sees the one before it, tried with two short samples of the data."""
    if not (trainer.args.packing or trainer.padding_free):
        return []
    first, second = (data.train[index % len(data.train)]["input_ids"][:_PROBE_TOKENS] for index in (0, 1))
    vocabulary = trainer.model.get_input_embeddings().weight.shape[0]
    other = [(token + 1) % vocabulary for token in first]
    with _left_as_it_was(trainer), torch.no_grad():
        trainer.model.eval()
        with trainer.compute_loss_context_manager():
            logits = [_second_logits(trainer, sample, second) for sample in (first, other)]
    if (logits[0] - logits[1]).norm() <= _PROBE_RTOL * logits[0].norm():
        return []
    attention = attention_of(trainer.model.config)
    return [
        Defect(
            "packing-mixes-samples",
            f"packed samples see each other: the logits of one depend on the sample before it (attention {attention}, "
            f"packing_strategy {trainer.args.packing_strategy})",
            "set packing_strategy: bfd with attn_implementation: sdpa or flash_attention_2, or packing: false",
            error=True,
        )
    ]


def too_large(what: str, rows: int, reason: str) -> Defect:
    """The defect that the longest batch, of a "training" or an "evaluation", does not fit."""
    remedy = "lower per_device_eval_batch_size"
    if what == "training":
        remedy = "see `qriemann plan --vram` for the cheapest change"
    problem = f"the {what} batch of the {rows} longest rows does not fit ({reason})"
    return Defect(f"{what}-too-large", problem, remedy, error=True)


def longest_rows(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """The `count` rows with the most tokens, longest first."""
    lengths = [len(ids) for batch in dataset.select_columns("input_ids").iter(1000) for ids in batch["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [dataset[index] for index in order[:count]]


def _second_logits(trainer: Any, first: list[int], second: list[int]) -> Tensor:
    """The logits of the second of two samples that the trainer's collator lays into one row."""
    row: dict[str, Any] = {"input_ids": first + second, "labels": first + second}
    if "seq_lengths" in trainer.train_dataset.column_names:
        row["seq_lengths"] = [len(first), len(second)]
    rows = [row] if trainer.args.packing else [{"input_ids": ids, "labels": ids} for ids in (first, second)]
    inputs = TrainerCounts(trainer).to_device(trainer.data_collator(rows))
    del inputs["labels"]
    return trainer.model(**inputs, use_cache=False).logits[0, len(first) :].float()


@contextmanager
def _timed(trainer: Any) -> Iterator[Callable[[], float]]:
    def now() -> float:
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize(trainer.args.device)
        return time.perf_counter()

    times = [now()]
    yield lambda: times[1] - times[0]
    times.append(now())


@contextmanager
def _left_as_it_was(trainer: Any, *, keep_gradients: bool = False) -> Iterator[None]:
    """Undoes what a batch leaves behind: random generators, gradients, train modes, and the trainer's counters."""
    undo_counts = TrainerCounts(trainer).saved()
    modes = [(module, module.training) for module in trainer.model.modules()]
    try:
        with preserved_rng():
            yield
    finally:
        undo_counts()
        for module, mode in modes:
            module.training = mode
        if not keep_gradients:
            trainer.model.zero_grad(set_to_none=True)
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()


def padding_share(lengths: ArrayLike, rows: int) -> float:
    """The share of a batch's tokens that is padding, over batches of that many rows in one random order."""
    order = np.random.default_rng(0).permutation(lengths)
    batches = np.array_split(order, range(rows, len(order), rows))
    return 1 - order.sum() / sum(batch.max() * len(batch) for batch in batches)


def much_padding(args: SFTConfig, lengths: ArrayLike) -> list[Defect]:
    """A notice where the rows of a batch differ much in length."""
    rows = args.per_device_train_batch_size
    if args.packing or args.padding_free or rows == 1 or args.train_sampling_strategy != "random":
        return []
    if (share := padding_share(np.minimum(lengths, args.max_length or np.inf), rows)) < _MUCH_PADDING:
        return []
    return [
        Defect(
            "padding",
            f"{share:.0%} of the tokens in batches of {rows} rows are padding",
            "train_sampling_strategy: group_by_length puts rows of like length together",
        )
    ]


def packing_mask(args: SFTConfig, attention: str) -> list[Defect]:
    """A notice where the rows of a packed batch become one long row whose attention is computed whole, mask and all."""
    rows = args.per_device_train_batch_size
    tokens = rows * (args.max_length or 0)
    one_row = args.packing and args.packing_strategy != "wrapped" and attention in ("sdpa", "eager")
    if not one_row or rows == 1 or tokens < _LONG_ROW:
        return []
    return [
        Defect(
            "packing-mask",
            f"packing lays the {rows} rows of a batch into one of {tokens} tokens, and attention {attention} computes all "
            f"{tokens} x {tokens} pairs under a mask of {2 * tokens**2 / GIB:.2f} GiB",
            f"set per_device_train_batch_size: 1 and gradient_accumulation_steps: {rows * args.gradient_accumulation_steps}, "
            "or attn_implementation: flash_attention_2",
        )
    ]
