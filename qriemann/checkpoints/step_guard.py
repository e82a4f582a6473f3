"""Skips steps with a non-finite loss or gradient, reports spikes, and stops when factors have left the manifold.

A skipped step leaves no trace, as if its batches had not been in the data: parameters and optimizer state keep every
bit, the schedule does not advance, the next step draws the random numbers that this one would have drawn, and the
reported means leave it out. It only counts as one of the run's steps, so that a run ends.
"""

import copy
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qriemann.checkpoints.manifest import last_complete
from qriemann.checkpoints.saving import DRIFT_LIMIT
from qriemann.checkpoints.seeding import pin_epoch, rows_of_step, seed_generators
from qriemann.distributed import process_count, sum_over_processes
from qriemann.errors import InputError
from qriemann.geometry.parameter import fixed_rank_parameters, orthonormality_drift
from qriemann.upstream import TrainerCounts

logger = logging.getLogger(__name__)

# The recent band: its length in steps, and the least number of steps before anything is called a spike.
_WINDOW, _WARM_UP = 100, 20
# A spike's distance from the median in standard deviations (of a normal distribution with the same median absolute
# deviation), and the least deviation as a share of the median, so that not every ripple of a flat curve is a spike.
_FAR, _LEAST_SPREAD = 8.0, 0.05
# The trainer's checkpoints keep this callback's state under this key.
_KEY = "qriemann_guard"


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step that was skipped, or that was taken although it lies far outside the recent band.

    Attributes:
        step: counted from 1, as in the trainer's records.
        loss, grad_norm: of the step; the norm before clipping.
        rows: indices of its training rows; empty for a stream.
    """

    kind: str
    step: int
    loss: float
    grad_norm: float
    rows: list[int]

    def __str__(self) -> str:
        rows = f"; training rows {', '.join(map(str, self.rows))}" if self.rows else ""
        what = "skipped, as if it had not been in the data" if self.kind == "skipped" else "far above the recent steps"
        return f"step {self.step}: {what}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}{rows}"

    def as_record(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        return {"step": self.step, self.kind: {"loss": self.loss, "grad_norm": self.grad_norm, "rows": self.rows}}


@dataclass
class _Progress:
    """What a resumed run must know about earlier steps."""

    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    # For the means that the next log event reports.
    loss_sum: float = 0.0
    last_logged: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0


class StepGuard(TrainerCallback):
    """Watches every optimizer step of a trainer. Costs one host synchronization a step.

    Args:
        trainer: its `accelerator.clip_grad_norm_` is wrapped, the only place that sees the norm before clipping, and its
            option logging_nan_inf_filter is switched off, which would hide the losses in question.
    """

    def __init__(
        self, trainer: Trainer, *, max_skipped_steps: int = 10, report: Callable[[StepEvent], None] | None = None
    ) -> None:
        self._trainer, self._max_skipped = trainer, max_skipped_steps
        self._report = report or (lambda event: logger.warning("%s", event))
        self._progress = _Progress()
        self._counts = TrainerCounts(trainer)
        self._grad_norm = self._loss_before = torch.zeros(())
        self._loss_resumed = 0.0
        self._metric_lengths: dict[str, int] = {}
        self._schedule: tuple[dict[str, Any], list[float]] | None = None
        trainer.args.logging_nan_inf_filter = False
        clip = trainer.accelerator.clip_grad_norm_

        def remember_norm(*args: Any, **kwargs: Any) -> Any:
            self._grad_norm = clip(*args, **kwargs)
            return self._grad_norm

        trainer.accelerator.clip_grad_norm_ = remember_norm

    @property
    def skipped_steps(self) -> int:
        """Steps skipped since the beginning of the run, including those before a resume."""
        return self._progress.skipped

    @property
    def spikes(self) -> int:
        """Steps far outside the recent band, likewise."""
        return self._progress.spikes

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress = progress = _Progress(**state.stateful_callbacks.get(_KEY, {}))
        # NaN (the mean of no steps) until a step is taken.
        self._counts.total_loss = math.nan
        if state.global_step:
            self._counts.loss_sum.fill_(progress.loss_sum)
            self._counts.last_logged_step = progress.last_logged
            self._counts.metrics.update(copy.deepcopy(progress.metrics))
            self._counts.tokens = progress.tokens
        # The trainer's last mean is over the steps since the resume.
        self._loss_resumed = progress.loss_sum

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        place = _order_seed(args), int(state.epoch or 0), state.global_step
        pin_epoch(kwargs["train_dataloader"], *place, args.gradient_accumulation_steps, args.process_index)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seed_generators(args.seed, state.global_step - self._progress.skipped, args.process_index)
        self._loss_before = self._counts.loss_sum.clone()
        self._metric_lengths = {name: len(values) for name, values in self._counts.metrics.items()}

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A trainer that resumes a finished run of max_steps takes one more step.
        if state.global_step >= state.max_steps:
            self._undo_step(kwargs["optimizer"], kwargs["lr_scheduler"])
            return
        total = self._counts.loss_sum
        drift = orthonormality_drift(fixed_rank_parameters(kwargs["model"].parameters()))
        measured = (total - self._loss_before, torch.as_tensor(self._grad_norm), total, drift)
        seen = torch.stack([value.to(total) for value in measured])
        # No process may skip a step that the others take. The gradient's norm is the same in all of them.
        loss, grad_norm, loss_sum, worst = (sum_over_processes(seen) / process_count()).tolist()
        progress = self._progress
        if not worst <= DRIFT_LIMIT:
            raise InputError(
                f"the factors must stay orthonormal, got max |U^T U - I| = {worst:.1e} before step {state.global_step + 1}; "
                f"{last_complete(str(args.output_dir))}; some other code writes to the factors"
            )
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if math.isnan(self._counts.total_loss):
                self._counts.total_loss = -self._loss_resumed
            progress.skipped_in_a_row, progress.loss_sum = 0, loss_sum
            if _is_spike(progress.losses, loss) or _is_spike(progress.norms, grad_norm):
                progress.spikes += 1
                self._tell("spike", loss, grad_norm, kwargs["train_dataloader"])
            progress.losses = [*progress.losses, loss][-_WINDOW:]
            progress.norms = [*progress.norms, grad_norm][-_WINDOW:]
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self._undo_step(kwargs["optimizer"], kwargs["lr_scheduler"])
        # The trainer averages losses over the steps since these counters; advancing both leaves the skipped step out.
        self._counts.last_logged_step += 1
        self._counts.first_step += 1
        self._tell("skipped", loss, grad_norm, kwargs["train_dataloader"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._schedule is not None:
            _restore_schedule(kwargs["optimizer"], kwargs["lr_scheduler"], *self._schedule)
            self._schedule = None
        if state.global_step > state.max_steps:
            state.global_step = state.max_steps
            control.should_log = control.should_evaluate = control.should_save = False
        self._remember(state, control)
        if self._progress.skipped_in_a_row > self._max_skipped:
            raise InputError(
                f"loss and gradient were not finite in {self._progress.skipped_in_a_row} steps in a row up to "
                f"step {state.global_step}; {last_complete(str(args.output_dir))}: lower the rate, or look at the rows above"
            )

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._remember(state, control)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if 0 < state.global_step <= self._progress.skipped:
            raise InputError(
                f"loss and gradient were finite in none of {state.global_step} steps: nothing was trained; lower the rate"
            )

    def _remember(self, state: TrainerState, control: TrainerControl) -> None:
        """Puts into the trainer's state what a resumed run needs."""
        progress = self._progress
        progress.last_logged, progress.tokens = self._counts.last_logged_step, self._counts.tokens
        # A script's trainer may keep tensors there, which no JSON holds.
        numbers = {n: v for n, v in self._counts.metrics.items() if all(isinstance(x, int | float) for x in v)}
        progress.metrics = numbers
        # The trainer is about to report them and to start over.
        if control.should_log and state.global_step > progress.last_logged:
            progress.loss_sum, progress.last_logged, progress.metrics = 0.0, state.global_step, {}
        state.stateful_callbacks[_KEY] = copy.deepcopy(vars(progress))

    def _undo_step(self, optimizer: Any, lr_scheduler: Any) -> None:
        """Leaves the optimizer nothing to do, and the means without the step."""
        # Parameters without a gradient are left alone by every torch optimizer, their state included.
        optimizer.zero_grad(set_to_none=True)
        self._schedule = copy.deepcopy(lr_scheduler.state_dict()), [float(g["lr"]) for g in optimizer.param_groups]
        self._counts.loss_sum.copy_(self._loss_before)
        # The trainer logs the norm of the last step that was taken.
        if isinstance(self._grad_norm, Tensor) and self._progress.norms:
            self._grad_norm.fill_(self._progress.norms[-1])
        metrics = self._counts.metrics
        for name in list(metrics):
            del metrics[name][self._metric_lengths.get(name, 0) :]
            # TRL divides by the length.
            if not metrics[name]:
                del metrics[name]

    def _tell(self, kind: str, loss: float, grad_norm: float, loader: Any) -> None:
        args, step = self._trainer.args, self._trainer.state.global_step
        rows = rows_of_step(loader, _order_seed(args), step, args.gradient_accumulation_steps)
        self._report(StepEvent(kind, step + 1, loss, grad_norm, rows))


def _order_seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def _is_spike(recent: list[float], value: float) -> bool:
    if len(recent) < _WARM_UP:
        return False
    median = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(other - median) for other in recent)
    return value - median > _FAR * max(spread, _LEAST_SPREAD * abs(median))


def _restore_schedule(optimizer: Any, lr_scheduler: Any, state: dict[str, Any], rates: list[float]) -> None:
    lr_scheduler.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
