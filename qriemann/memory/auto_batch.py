"""Finds how many rows fit into memory at once, and cuts each step's rows into parts of that size.

Neither the rows of a step nor their order nor the loss, a mean over the tokens of the whole step, depend on the cut. A step
that runs out of memory is repeated in smaller parts: nothing of it has reached the optimizer yet.
"""

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qriemann.device import GIB, describe_shortage, free_bytes, is_out_of_memory
from qriemann.distributed import largest_over_processes, process_count
from qriemann.errors import InputError, ShortMemoryError
from qriemann.memory.dry_run import cheapest_change, longest_rows, measure
from qriemann.upstream import TrainerCounts

logger = logging.getLogger(__name__)

# The state of a trainer's checkpoints holds the choice of `AutoBatch` under this key.
AUTO_BATCH_KEY = "qriemann_auto_batch"

# The share of the free memory that is used: allocators leave gaps, and other programs start.
_USED_SHARE = 0.9


@dataclass(frozen=True)
class BatchFit:
    """The choice for one device.

    Attributes:
        tokens: at most this many at once if rows are laid end to end (packing).
        needed_gib, free_gib: what the longest rows took beyond what was held, and what there was.
        fallbacks: how often the choice has been halved since.
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


def rows_at_once(args: TrainingArguments, state: TrainerState) -> int:
    """The rows that a device takes through the model at once: the choice of `AutoBatch`, or the trainer's batch."""
    chosen = state.stateful_callbacks.get(AUTO_BATCH_KEY)
    return args.train_batch_size if chosen is None else min(args.train_batch_size, chosen["rows"])


class AutoBatch(TrainerCallback):
    """Cuts the rows of every optimizer step of a trainer into parts that fit.

    A step of a device has per_device_train_batch_size times gradient_accumulation_steps rows, as they are when this is made.
    When training begins, the longest rows go through forward and backward a few times; a resumed run keeps its choice.

    Raises:
        InputError: when training begins, if one row does not fit, or if the data or the processes do not allow a cut.
    """

    def __init__(self, trainer: Trainer, *, report: Callable[[BatchFit], None] | None = None) -> None:
        args = trainer.args
        self._trainer, self._take_step = trainer, trainer.training_step
        self._report = report or (lambda fit: logger.warning("%s", fit))
        self._rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.per_device_train_batch_size, args.gradient_accumulation_steps = self._rows_per_step, 1
        TrainerCounts(trainer).batch_size = args.train_batch_size
        trainer.training_step = self._step
        # The first callback, so that a row that does not fit is found before anything is written.
        trainer.callback_handler.callbacks.insert(0, self)
        self.fit: BatchFit | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(AUTO_BATCH_KEY)
        self._keep(BatchFit(**kept) if kept else self._choose(kwargs["train_dataloader"]), state)

    def _keep(self, fit: BatchFit, state: TrainerState) -> None:
        self.fit = fit
        state.stateful_callbacks[AUTO_BATCH_KEY] = asdict(fit)
        self._report(fit)

    def _choose(self, dataloader: DataLoader) -> BatchFit:
        longest = longest_rows(dataloader.dataset, self._rows_per_step)
        lengths = [len(row["input_ids"]) for row in longest]
        if process_count() > 1 and "attention_mask" not in dataloader.collate_fn(longest[:1]):
            raise InputError("auto_batch does not work with packing or padding_free in several processes; leave it out")
        device = self._trainer.args.device
        free, held = free_bytes(device), self._held_later()
        chosen, need, slope = 0, held, 0.0
        for size in (s for s in range(1, self._rows_per_step + 1) if self._rows_per_step % s == 0):
            # A GPU raises an error when memory runs out; on a CPU the system kills the process.
            if device.type == "cpu" and need + slope * (size - chosen) > _USED_SHARE * free:
                break
            taken = self._measure(longest[:size])
            if taken is None or taken + held > _USED_SHARE * free:
                break
            slope = (taken + held - need) / (size - chosen)
            chosen, need = size, taken + held
        chosen = -largest_over_processes(-chosen)
        if not chosen:
            raise InputError(
                f"{lengths[0]} tokens do not fit into {free / GIB:.2f} GiB; {cheapest_change(self._trainer.args, 1)}"
            )
        return BatchFit(
            rows=chosen,
            rows_per_step=self._rows_per_step,
            tokens=sum(lengths[:chosen]),
            longest_tokens=lengths[0],
            needed_gib=round(need / GIB, 3),
            free_gib=round(free / GIB, 3),
        )

    def _held_later(self) -> int:
        """Bytes that later steps hold and the first does not: gradients of earlier parts, and optimizer state."""
        optimizer = self._trainer.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # AdamW and its kind allocate two blocks in their first step.
        without_state = [p for p in parameters if not optimizer.state.get(p)]
        return 4 * sum(p.numel() for p in parameters) + 8 * sum(p.numel() for p in without_state)

    def _measure(self, rows: list[dict[str, Any]]) -> int | None:
        """Bytes that forward and backward of the rows take beyond what is held; None if they do not fit."""
        trainer, taken = self._trainer, None
        # Metrics are not gathered: other processes may have run out of memory already.
        trainer.accelerator.gather_for_metrics = lambda value: value
        try:
            taken = measure(trainer, rows, lambda inputs: self._take_parts(trainer.model, [inputs]), counted=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            del trainer.accelerator.gather_for_metrics
        # The exception kept the activations alive until here.
        clear_device_cache()
        return None if taken is None else taken.counted

    def _step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The trainer's training step, part by part."""
        trainer, undo_counts = self._trainer, TrainerCounts(self._trainer).saved()
        while True:
            fit = self.fit
            assert fit is not None
            try:
                return self._take_parts(model, _parts(inputs, fit), num_items_in_batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # Other processes may be in the middle of a collective operation, which cannot be aborted.
                if fit.rows == 1 or process_count() > 1:
                    raise ShortMemoryError(
                        f"{fit.rows} rows at once do not fit into memory: {describe_shortage(error)}; "
                        f"{cheapest_change(trainer.args, 1)}"
                    ) from error
            trainer.optimizer.zero_grad(set_to_none=True)
            undo_counts()
            clear_device_cache(garbage_collection=True)
            logger.warning("out of memory in step %d; repeating it with half the rows", trainer.state.global_step + 1)
            tokens = max(fit.tokens // 2, fit.longest_tokens)
            fit = replace(fit, rows=fit.rows // 2, tokens=tokens, fallbacks=fit.fallbacks + 1)
            self._keep(fit, trainer.state)

    def _take_parts(self, model: Any, parts: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        trainer = self._trainer
        # The trainer divides by this whatever is not a mean over the tokens of the whole step already.
        trainer.current_gradient_accumulation_steps = len(parts)
        losses = []
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model):
                losses.append(self._take_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()


def _parts(inputs: dict[str, Any], fit: BatchFit) -> list[dict[str, Any]]:
    """A batch cut into parts, in order: of rows, or of whole samples if they are laid end to end."""
    if "attention_mask" not in inputs:
        return _parts_of_one_row(inputs, fit.tokens)
    rows = len(inputs["input_ids"])
    parts = []
    for first in range(0, rows, fit.rows):
        part = {k: v[first : first + fit.rows] if _has_length(v, 0, rows) else v for k, v in inputs.items()}
        width, used = inputs["attention_mask"].shape[1], int(part["attention_mask"].any(0).nonzero().max()) + 1
        # The batch is padded to its longest row, which may be in another part.
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
