"""A learning rate that is measured before the first step, inside a stock trainer.

trainer = SFTTrainer(
    ...,
    optimizer_cls_and_kwargs=qriemann.for_trainer("riemannion"),
    callbacks=[qriemann.MeasuredRate()],
)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from accelerate.utils import send_to_device
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qriemann.adapters.gradient import probing
from qriemann.adapters.loi import preserved_rng
from qriemann.distributed import is_main_process
from qriemann.errors import InputError
from qriemann.memory.auto_batch import rows_at_once
from qriemann.optim.measured_rate import CHANGE, NoSuchRateError, adapter_groups, measure_rate
from qriemann.training.sample import draw_batches, lean_loss
from qriemann.training.seam import unwrapped

# The state of a trainer's checkpoints holds the rate under this key.
_KEY = "qriemann_measured_rate"
# Trained tokens of a batch that are compared: their probabilities over the whole vocabulary are kept in host memory.
_TOKENS = 256


class MeasuredRate(TrainerCallback):
    """Sets the learning rate to the one whose first step changes the model's answers by `change`.

    The schedule goes on from that rate, and a checkpoint keeps it: a resumed run measures nothing. Layers that are trained in
    full beside the adapter keep their own. The batches are a sample of the trainer's data, drawn beside its dataloader, so
    the training that follows is that of a run whose rate was given as a number. Put it behind `LocallyOptimalInit`.

    Args:
        change: mean KL in nats a trained token, > 0.
        rows: of each process to look at, >= 1.
        note: called with the line that says what was found; None prints it.

    Raises:
        InputError: a value out of range, or, when training begins, batches without labels.
    """

    def __init__(self, change: float = CHANGE, *, rows: int = 32, note: Callable[[str], None] | None = None) -> None:
        if not change > 0 or not math.isfinite(change):
            raise InputError(f"change must be a number above 0, got {change!r}")
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise InputError(f"rows must be an integer >= 1, got {rows!r}")
        self._change, self._rows = change, rows
        self._note = note or Console(stderr=True, soft_wrap=True).print

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer, schedule = (
            unwrapped(kwargs["optimizer"], "optimizer"),
            unwrapped(kwargs["lr_scheduler"], "scheduler"),
        )
        # A schedule may begin with a warm-up from zero.
        firsts = [group.get("initial_lr", group["lr"]) for group in adapter_groups(optimizer)]
        scheduled = [group["lr"] for group in adapter_groups(optimizer)]
        if state.global_step > 0 and _KEY in state.stateful_callbacks:
            rate = state.stateful_callbacks[_KEY]["rate"]
        else:
            for group, first in zip(adapter_groups(optimizer), firsts, strict=True):
                group["lr"] = first
            rate = self._measure(args, state, optimizer, kwargs["model"], kwargs["train_dataloader"])
        for group, first, now in zip(adapter_groups(optimizer), firsts, scheduled, strict=True):
            group["initial_lr"] = first / firsts[0] * rate
            group["lr"] = group["initial_lr"] * (now / first)
        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
            schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
        # Not args.learning_rate, which is what the user asked for and what a resumed run is compared by.
        state.stateful_callbacks[_KEY] = {"rate": rate}

    def _measure(
        self, args: TrainingArguments, state: TrainerState, optimizer: Any, model: Any, loader: DataLoader
    ) -> float:
        started, size = time.perf_counter(), rows_at_once(args, state)
        with preserved_rng(), probing(model):
            count = math.ceil(self._rows / max(size, 1))
            batches = draw_batches(loader, count, size, args.seed + args.process_index)
            try:
                rate, tried = measure_rate(
                    optimizer,
                    [send_to_device(batch, args.device) for batch in batches],
                    lambda batch: lean_loss(model, batch),
                    lambda batch: _log_probabilities(model, batch),
                    change=self._change,
                )
            except NoSuchRateError as error:
                # A model with random weights, say, gives the same answers whatever a layer does.
                rate = adapter_groups(optimizer)[0]["lr"]
                line = f"{error}: the method's own, {rate:g}, is taken"
            else:
                seconds = time.perf_counter() - started
                line = (
                    f"learning rate {rate:g}: its first step changes the answers by {self._change:g} nats a token "
                    f"({len(tried)} tries, {seconds:.0f} s)"
                )
        if is_main_process():
            self._note(line)
        return rate


def measured_rate(state: TrainerState) -> float | None:
    """The rate that a training goes by, if it was measured."""
    return state.stateful_callbacks.get(_KEY, {}).get("rate")


def _log_probabilities(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the trained tokens of a batch, at most _TOKENS of them: (tokens, vocabulary), float32."""
    labels = batch["labels"]
    # The logits at a position are about the next token.
    places = (labels[:, 1:] != -100).nonzero()
    places = places[:: math.ceil(len(places) / _TOKENS) or 1]
    rows, columns = places.unbind(1)

    def keep(head: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        # The logits of the whole vocabulary would be the largest tensor of a training.
        return given[0][rows, columns][None], *given[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        output = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)
    finally:
        handle.remove()
    return output.logits[0].float().log_softmax(1)
