"""One call that makes a stock trainer safe to interrupt: `qriemann.protect(trainer)`.

trainer = SFTTrainer(...)
qriemann.protect(trainer)
trainer.train(resume_from_checkpoint=True)
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer

from qriemann.adapters.attach import accept_offset_checkpoints
from qriemann.training.checkpoints import CompleteCheckpoints, whole_checkpoint
from qriemann.training.guard import StepEvent, StepGuard

logger = logging.getLogger(__name__)


def protect(
    trainer: Trainer,
    *,
    max_skipped_steps: int = 10,
    run: Mapping[str, Any] | None = None,
    on_event: Callable[[StepEvent], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> StepGuard:
    """Adds complete checkpoints, exact resume and skipping of non-finite steps to a trainer of transformers or TRL.

    Call it once, before `train`. It switches logging_nan_inf_filter off, takes over save_total_limit, and lets
    `train(resume_from_checkpoint=True)` take the newest checkpoint that verifies, not the one of the highest number.

    Args:
        trainer: of transformers or TRL, before it trains.
        max_skipped_steps: more steps in a row without finite loss and gradient stop the run.
        run: what a run that resumes must have in common with this one; kept in every checkpoint's manifest.
        on_event: called when a step is skipped or far outside the recent band; logs a warning by default.
        note: takes lines for the reader; logs a warning by default.

    Returns:
        The guard, which counts those steps.
    """
    accept_offset_checkpoints(trainer.model)
    guard = StepGuard(trainer, max_skipped_steps=max_skipped_steps, report=on_event)
    trainer.add_callback(guard)
    tell = note or (lambda line: logger.warning("%s", line))
    trainer.add_callback(CompleteCheckpoints(tell, run))
    trainer.train = _resuming_from_a_whole_one(trainer, tell)  # type: ignore[method-assign]
    return guard


def _resuming_from_a_whole_one(trainer: Trainer, note: Callable[[str], None]) -> Callable[..., Any]:
    """The trainer's `train`, whose own choice would be whatever a save that broke off has left."""
    train = trainer.train

    @functools.wraps(train)
    def train_from_a_whole_one(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            found = whole_checkpoint(
                str(trainer.args.output_dir),
                asked="resume_from_checkpoint=True",
                remedy="leave it out, or name the folder of one",
            )
            for line in found.passed_over:
                note(f"passed over {line}")
            resume_from_checkpoint = str(found.path)
        return train(resume_from_checkpoint, *args, **kwargs)

    return train_from_a_whole_one
