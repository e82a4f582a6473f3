"""The trainer's callback that measures a run, writes `metrics.jsonl` and hands each record to a view."""

import time
from collections import deque
from collections.abc import Callable
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from qriemann.folder.records import append_metrics, peak_gib, read_metrics
from qriemann.training.display import PlainView
from qriemann.training.seam import fixed_rank_optimizer

# Under this key the state of a trainer's checkpoints holds the monitor's totals.
_KEY = "qriemann_monitor"
_EVALUATING, _SAVING = "evaluating", "saving a checkpoint"
# An evaluation or a save that took less than this many seconds is not announced the next time.
_SHORT = 3.0


class Monitor(TrainerCallback):
    """Measures a run and records it; the trainer's own progress callbacks are to be removed.

    Args:
        device: whose peak memory counts.
        on_begin: called with the first step before anything is recorded; the place for the first write of a run.
    """

    def __init__(
        self,
        view: PlainView,
        folder: Path,
        device: torch.device,
        on_begin: Callable[[int], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.view = view
        self.records: list[dict[str, Any]] = []
        self.begun = False
        self._folder, self._device, self._on_begin, self._clock = folder, device, on_begin, clock
        self._started = self._last_event = clock()
        # Seconds of training, then tokens and seconds of training at the last log event.
        self._totals = [0.0, 0.0, 0.0]
        # Of the last steps, but not of the first one, which pays for start-up.
        self._step_seconds: deque[float] = deque(maxlen=50)
        # Of the last evaluation and the last save.
        self._wait_seconds: dict[str, float] = {}
        self._first_step = self._evaluated_batches = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens through the model per second of training, from the beginning of the run to the last log event."""
        _, tokens, seconds = self._totals
        return tokens / seconds if seconds else 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._first_step = state.global_step
        # The trainer saves this very list with each checkpoint.
        self._totals = state.stateful_callbacks.setdefault(_KEY, self._totals)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        if state.is_world_process_zero:
            self._on_begin(state.global_step)
            self.begun = True
            self.records = read_metrics(self._folder)
        self._wait_seconds.update((_EVALUATING, r["eval_runtime"]) for r in self.records if "eval_runtime" in r)
        self.view.start(first_step=state.global_step, total_steps=state.max_steps)
        if args.eval_on_start:
            self.view.now(_EVALUATING)
        self._started = self._last_event = self._clock()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = self._since_last_event()
        self._totals[0] += seconds
        if state.global_step > self._first_step + 1:
            self._step_seconds.append(seconds)
        self.view.step(state.global_step, self._seconds_left(args, state, control))
        self._announce(control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._announce(control)

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated_batches += 1
        self.view.now(_EVALUATING, self._evaluated_batches, len(kwargs["eval_dataloader"]))

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated_batches = 0
        self._end_wait(_EVALUATING, control)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end_wait(_SAVING, control)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        record: dict[str, Any] = {
            "step": state.global_step,
            "epoch": state.epoch,
            "seconds": round(self._clock() - self._started, 3),
            **{key: value for key, value in logs.items() if key not in ("epoch", "total_flos")},
        }
        if "loss" in logs:
            record.update(self._measure(logs, kwargs.get("optimizer")))
            left = self._seconds_left(args, state, control)
            record.update({} if left is None else {"eta_s": round(left, 1)})
        self.records.append(record)
        append_metrics(self._folder, record)
        self.view.log(record)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.view.stop()

    def _measure(self, logs: dict[str, Any], optimizer: Any) -> dict[str, float]:
        """What the trainer does not log: speed over the steps since the last event, memory, drift."""
        # TRL counts the tokens of all batches, padding excluded, and the guard goes on counting after a resume.
        now, total = self._totals[0], float(logs.get("num_tokens", 0))
        tokens, seconds = total - self._totals[1], now - self._totals[2]
        self._totals[1:] = total, now
        measured = {
            "tokens_per_s": round(tokens / seconds, 1) if seconds > 0 else 0.0,
            "peak_gib": round(peak_gib(self._device), 4),
        }
        on_manifold = fixed_rank_optimizer(optimizer)
        if on_manifold is not None:
            measured["orthonormality_drift"] = float(on_manifold.orthonormality_drift())
        return measured

    def _since_last_event(self) -> float:
        """Seconds since the last step, evaluation or save ended."""
        before, self._last_event = self._last_event, self._clock()
        return self._last_event - before

    def _announce(self, control: TrainerControl) -> None:
        """Shows the wait that the trainer begins now, if it is a long one."""
        what = _EVALUATING if control.should_evaluate else _SAVING if control.should_save else ""
        if what and self._wait_seconds.get(what, _SHORT) >= _SHORT:
            self.view.now(what)

    def _end_wait(self, what: str, control: TrainerControl) -> None:
        self._wait_seconds[what] = self._since_last_event()
        self.view.now("")
        self._announce(control)

    def _seconds_left(self, args: Any, state: TrainerState, control: TrainerControl) -> float | None:
        """Predicts the time to the end of the training; None after the first step."""
        if not self._step_seconds:
            return None
        evaluations = _events_left(args.eval_strategy, state.eval_steps, state, due=control.should_evaluate)
        saves = _events_left(args.save_strategy, state.save_steps, state, due=control.should_save)
        return (
            (state.max_steps - state.global_step) * median(self._step_seconds)
            + evaluations * self._wait_seconds.get(_EVALUATING, 0.0)
            + saves * self._wait_seconds.get(_SAVING, 0.0)
        )


def _events_left(strategy: str, every: int, state: TrainerState, *, due: bool) -> int:
    """How many evaluations or saves are still to come; the trainer adds one after the last step."""
    if strategy == "steps":
        ahead = (state.max_steps - 1) // every - state.global_step // every + 1
        return due + (ahead if state.global_step < state.max_steps else 0)
    # The one at the end of an epoch is still ahead when its last step ends.
    return state.num_train_epochs - ceil(state.epoch or 0.0) + 1 if strategy == "epoch" else 0
