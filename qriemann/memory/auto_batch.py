"""How many rows go through the model at once: measured before the first step, and halved where that was too many after all.

The dataloader hands over all rows of an optimizer step; here they are cut into parts that fit. So the rows of a step, their
order and its loss (a mean over the tokens of the whole step) do not depend on the cut, and a step that runs out of memory is
simply taken again in smaller parts: nothing of it has reached the optimizer yet.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qriemann.distributed import largest_over_processes, process_count
from qriemann.errors import InputError
from qriemann.memory.dry_run import longest_rows
from qriemann.memory.live_bytes import LiveBytes, adapter_tensors
from qriemann.training.seam import AUTO_BATCH_KEY

logger = logging.getLogger(__name__)

# The share of the free memory that is used: allocators leave gaps, and other programs come.
_USED_SHARE = 0.9


@dataclass(frozen=True)
class BatchFit:
    """The choice for one device.

    Attributes:
        rows: at most so many at once.
        rows_per_step: of one device.
        tokens: at most so many at once where rows are laid end to end (packing).
        longest_tokens: of the longest row.
        needed_gib, free_gib: what the longest rows took beyond what was held, and what there was.
        fallbacks: how often the choice was halved since.
    """

    rows: int
    rows_per_step: int
    tokens: int
    longest_tokens: int
    needed_gib: float
    free_gib: float
    fallbacks: int = 0

    def __str__(self) -> str:
        passes = math.ceil(self.rows_per_step / self.rows)
        return (
            f"auto_batch: {self.rows} rows at once, {passes} times a step; the longest, up to {self.longest_tokens} tokens, "
            f"take {self.needed_gib:.2f} of {self.free_gib:.2f} GiB"
        )


class AutoBatch(TrainerCallback):
    """Cuts the rows of every optimizer step of a trainer into parts that fit.

    per_device_train_batch_size times gradient_accumulation_steps, as they are when this is made, is the number of rows that a
    device sums a step over. When training begins, the longest rows go through forward and backward once or a few times; a run
    that resumes keeps the choice of the run it goes on from.

    Args:
        trainer: a `SFTTrainer` whose training has not begun; its `training_step` is wrapped, and this callback added to it.
        report: called with the choice and again whenever it is halved; the default logs it.

    Raises:
        InputError: when training begins, if one row does not fit, or for data or processes that cannot be cut.
    """

    def __init__(self, trainer: Trainer, *, report: Callable[[BatchFit], None] | None = None) -> None:
        args = trainer.args
        self._trainer, self._take_step = trainer, trainer.training_step
        self._report = report or (lambda fit: logger.warning("%s", fit))
        self._rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.per_device_train_batch_size, args.gradient_accumulation_steps = self._rows_per_step, 1
        trainer._train_batch_size = args.train_batch_size
        trainer.training_step = self._step
        # Before the others, so that a row that does not fit is known before anything is written.
        trainer.callback_handler.callbacks.insert(0, self)
        self.fit: BatchFit | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = state.stateful_callbacks.get(AUTO_BATCH_KEY)
        self._keep(BatchFit(**kept) if kept else self._choose(kwargs["train_dataloader"]), state)

    def _keep(self, fit: BatchFit, state: TrainerState) -> None:
        self.fit = fit
        state.stateful_callbacks[AUTO_BATCH_KEY] = asdict(fit)
        self._report(fit)

    def _choose(self, dataloader: DataLoader) -> BatchFit:
        if not isinstance(dataloader.dataset, Dataset):
            raise InputError(
                f"auto_batch must have a datasets.Dataset to find the longest rows of, got "
                f"{type(dataloader.dataset).__name__}; leave it out"
            )
        longest = longest_rows(dataloader.dataset, self._rows_per_step)
        lengths = [len(row["input_ids"]) for row in longest]
        if process_count() > 1 and "attention_mask" not in dataloader.collate_fn(longest[:1]):
            raise InputError(
                "auto_batch must be left out with packing or padding_free in several processes, which have to take the same "
                "number of parts; set per_device_train_batch_size and gradient_accumulation_steps to what fits"
            )
        device = self._trainer.args.device
        free, held = _free_bytes(device), self._held_later()
        chosen, need, slope = 0, held, 0.0
        for size in (s for s in range(1, self._rows_per_step + 1) if self._rows_per_step % s == 0):
            # A GPU says so when its memory is short; a system ends the process.
            if device.type == "cpu" and need + slope * (size - chosen) > _USED_SHARE * free:
                break
            taken = self._measure(dataloader.collate_fn(longest[:size]))
            if taken is None or taken + held > _USED_SHARE * free:
                break
            slope = (taken + held - need) / (size - chosen)
            chosen, need = size, taken + held
        chosen = -largest_over_processes(-chosen)
        if not chosen:
            raise InputError(
                f"max_length must be one at which a single row fits into memory, got a row of {lengths[0]} tokens that does "
                f"not fit into {free / 2**30:.2f} GiB; lower max_length, or set activation_checkpointing: true"
            )
        return BatchFit(
            rows=chosen,
            rows_per_step=self._rows_per_step,
            tokens=sum(lengths[:chosen]),
            longest_tokens=lengths[0],
            needed_gib=round(need / 2**30, 3),
            free_gib=round(free / 2**30, 3),
        )

    def _held_later(self) -> int:
        """Bytes that are held during later steps and are not there in the first: gradients of the parts before, and state."""
        optimizer = self._trainer.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # AdamW and its kind make two blocks in their first step.
        without_state = [p for p in parameters if not optimizer.state.get(p)]
        return 4 * sum(p.numel() for p in parameters) + 8 * sum(p.numel() for p in without_state)

    def _measure(self, inputs: dict[str, Any]) -> int | None:
        """Bytes that forward and backward of a batch take beyond what is held, or None where they do not fit."""
        trainer = self._trainer
        device, before = trainer.args.device, self._counters()
        taken: int | None = None
        # All devices by name, because torch warns when it has to choose among several.
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            try:
                with _alone(trainer.accelerator), _counted(device, trainer.model) as count:
                    self._take_parts(trainer.model, [inputs], None)
                    taken = count()
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
        # Only now, because the exception keeps the activations alive.
        self._undo(before)
        clear_device_cache()
        return taken

    def _step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The trainer's training step, part by part."""
        assert self.fit is not None
        before = self._counters()
        while True:
            try:
                return self._take_parts(model, _parts(inputs, self.fit), num_items_in_batch)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                # Other processes may be in the middle of a sum over all, which cannot be called off.
                if self.fit.rows == 1 or process_count() > 1:
                    raise InputError(
                        f"the rows that go through the model at once must fit into memory, got {self.fit.rows} that do not: "
                        f"{str(error).splitlines()[0]}; lower max_length, or set activation_checkpointing: true"
                    ) from error
            self._undo(before)
            clear_device_cache(garbage_collection=True)
            fit, state = self.fit, self._trainer.state
            logger.warning("out of memory in step %d, which is taken again with half the rows", state.global_step + 1)
            self._keep(
                replace(
                    fit,
                    rows=fit.rows // 2,
                    tokens=max(fit.tokens // 2, fit.longest_tokens),
                    fallbacks=fit.fallbacks + 1,
                ),
                state,
            )

    def _take_parts(self, model: Any, parts: Sequence[dict[str, Any]], num_items_in_batch: Any) -> Tensor:
        trainer = self._trainer
        # By this the trainer divides what is not a mean over the tokens of the whole step already.
        trainer.current_gradient_accumulation_steps = len(parts)
        losses = []
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model):
                losses.append(self._take_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def _counters(self) -> tuple[Any, Any]:
        """What a TRL trainer counts and averages in a step."""
        return copy.deepcopy(getattr(self._trainer, "_metrics", None)), getattr(
            self._trainer, "_total_train_tokens", None
        )

    def _undo(self, counters: tuple[Any, Any]) -> None:
        self._trainer.optimizer.zero_grad(set_to_none=True)
        self._trainer._metrics, self._trainer._total_train_tokens = counters


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    # What torch's allocator holds and does not use is as good as free.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@contextlib.contextmanager
def _alone(accelerator: Any) -> Iterator[None]:
    """Within the block, the metrics of a batch are not summed over processes: others may be short of memory by now."""
    accelerator.gather_for_metrics = lambda value: value
    try:
        yield
    finally:
        del accelerator.gather_for_metrics


@contextlib.contextmanager
def _counted(device: torch.device, model: Any) -> Iterator[Callable[[], int]]:
    """Within the block, what it yields tells the peak of the bytes that were made in it."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield lambda: torch.cuda.max_memory_allocated(device) - held
        finally:
            torch.cuda.reset_peak_memory_stats(device)
        return
    # Resident memory says nothing here: the C library keeps what was freed, for the next of its size.
    with LiveBytes([*model.parameters(), *model.buffers(), *adapter_tensors(model)]) as counter:
        yield lambda: sum(counter.peaks[counter.window].values())


def _parts(inputs: dict[str, Any], fit: BatchFit) -> list[dict[str, Any]]:
    """A batch cut into parts, in order: of rows, or of whole samples where they are laid end to end."""
    if "attention_mask" not in inputs:
        return _parts_of_one_row(inputs, fit.tokens)
    rows = len(inputs["input_ids"])
    parts = []
    for first in range(0, rows, fit.rows):
        part = {k: v[first : first + fit.rows] if _has_length(v, 0, rows) else v for k, v in inputs.items()}
        width, used = inputs["attention_mask"].shape[1], int(part["attention_mask"].any(0).nonzero().max()) + 1
        # The whole batch was padded to the longest row of all.
        parts.append({k: v[:, :used] if _has_length(v, 1, width) else v for k, v in part.items()})
    return parts


def _parts_of_one_row(inputs: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    bounds = inputs["cu_seq_lens_q"]
    cuts = [0]
    for start, end in pairwise(bounds.tolist()):
        if end - cuts[-1] > tokens:
            cuts.append(start)
    cuts.append(int(bounds[-1]))
    parts = []
    for first, last in pairwise(cuts):
        part = {k: v[:, first:last] if _has_length(v, 1, int(bounds[-1])) else v for k, v in inputs.items()}
        inside = bounds[(bounds >= first) & (bounds <= last)] - first
        lengths = {"cu_seq_lens_q": inside, "cu_seq_lens_k": inside}
        longest = dict.fromkeys(("max_length_q", "max_length_k"), int(inside.diff().max()))
        parts.append({**part, **lengths, **longest, "seq_idx": part["seq_idx"] - part["seq_idx"][:, :1]})
    return parts


def _has_length(value: Any, dimension: int, length: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > dimension and value.shape[dimension] == length
