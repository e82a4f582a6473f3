"""Ctrl-C and SIGTERM: the first signal finishes the step and saves it, the second stops the run at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from qriemann.distributed import largest_over_processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedBySignal(KeyboardInterrupt):
    """A run ended by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class GracefulStop(TrainerCallback):
    """Within `with`, the first SIGINT or SIGTERM saves at the end of the step and ends the training.

    Outside of the main thread, where Python allows no handlers, signals keep their meaning.

    Attributes:
        saved: whether a signal made the run save a checkpoint.
    """

    def __init__(self) -> None:
        self.saved = False
        self._received: int | None = None
        self._last_saved: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_at_once(self) -> None:
        """Raises StoppedBySignal if a signal came, and from now on at the first; call it when everything is saved."""
        self._at_once = True
        number = largest_over_processes(self._received or 0)
        if number:
            raise StoppedBySignal(number)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A signal reaches the processes of a run at different steps; all have to stop after the same one.
        if largest_over_processes(self._received or 0):
            self.saved = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The trainer also calls this when the training stops: after an evaluation during which the signal came, or which
        # cancelled the save (save_strategy best). Another evaluation would do the same.
        if largest_over_processes(self._received or 0):
            self.saved = control.should_training_stop = True
            control.should_save = self._last_saved != state.global_step
            control.should_evaluate = False

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last_saved = state.global_step

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or self._received is not None:
            raise StoppedBySignal(number)
        self._received = number
        # print may be what the signal interrupted, and it cannot be entered twice.
        os.write(2, b"qriemann: stopping after this step, which is saved; once more to stop at once\n")
