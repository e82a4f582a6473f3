"""The trainer's callback that measures a run, writes `metrics.jsonl` and hands each record to a view."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from qriemann.folder.records import append_metrics, peak_gib, read_metrics
from qriemann.training.display import PlainView
from qriemann.training.seam import fixed_rank_optimizer

# Under this key the state of a trainer's checkpoints holds the monitor's totals.
_KEY = "qriemann_monitor"
_EVALUATING = "evaluating"


class Monitor(TrainerCallback):
    """Measures a run and records it; the trainer's own progress callbacks are to be removed.

    Args:
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
        self._started = self._last_event = self._started_up = clock()
        # Seconds of training, then tokens and seconds of training at the last log event.
        self._totals = [0.0, 0.0, 0.0]
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
        self.view.start(first_step=state.global_step, total_steps=state.max_steps)
        if args.eval_on_start:
            self.view.now(_EVALUATING)
        self._started = self._last_event = self._clock()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._totals[0] += self._since_last_event()
        if state.global_step == self._first_step + 1:
            self._started_up = self._clock()
        self.view.step(state.global_step, self._seconds_left(state))

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated_batches += 1
        self.view.now(_EVALUATING, self._evaluated_batches, len(kwargs["eval_dataloader"]))

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated_batches = 0
        self.view.now("")
        self._since_last_event()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._since_last_event()

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
            left = self._seconds_left(state)
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

    def _seconds_left(self, state: TrainerState) -> float | None:
        """The time to the end of the training at the pace since the first step, evaluations included; None after that."""
        taken = state.global_step - self._first_step - 1
        pace = (self._clock() - self._started_up) / taken if taken > 0 else None
        return None if pace is None else (state.max_steps - state.global_step) * pace
