"""Makes a stock trainer safe to interrupt with one call: `qriemann.protect(trainer)`."""

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from qriemann.adapters.attach import accept_offset_checkpoints
from qriemann.checkpoints.continued import keep_options
from qriemann.checkpoints.fingerprints import check_same_run, fingerprints_of_trainer
from qriemann.checkpoints.manifest import find_content_defect, whole_checkpoint
from qriemann.checkpoints.saving import CompleteCheckpoints
from qriemann.checkpoints.step_guard import StepEvent, StepGuard
from qriemann.errors import InputError

logger = logging.getLogger(__name__)


def protect(
    trainer: Trainer,
    *,
    max_skipped_steps: int = 10,
    run: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
    on_event: Callable[[StepEvent], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> StepGuard:
    """Adds complete checkpoints, exact resume and skipping of non-finite steps to a trainer of transformers or TRL.

    Call it once, before `train`. It switches logging_nan_inf_filter off, takes over save_total_limit, and makes
    `train(resume_from_checkpoint=True)` resume from the newest checkpoint that verifies instead of the highest number. With
    load_best_model_at_end, every evaluation that is the best so far is saved.

    Args:
        trainer: of transformers or TRL, before it trains.
        max_skipped_steps: more steps in a row without finite loss and gradient stop the run.
        run: what every checkpoint's manifest says about this run, if the caller compares it and verifies what it resumes
            from. By default arguments, rows, base and number of processes, and a run that resumes must not change them.
        allow: names of what may change all the same, as the refusal names them: "max_steps", "data", "base".
        on_event: called when a step is skipped or is a spike; logs a warning by default.
        note: takes lines for the reader; logs a warning by default.

    Returns:
        The guard, which counts those steps.

    Raises:
        InputError: ignore_data_skip is set; a resumed run would see other rows.
    """
    if trainer.args.ignore_data_skip:
        raise InputError(
            "ignore_data_skip must be false: with it, a resumed run sees other rows than an uninterrupted one"
        )
    accept_offset_checkpoints(trainer.model)
    guard = StepGuard(trainer, max_skipped_steps=max_skipped_steps, report=on_event)
    trainer.add_callback(guard)
    note = note or (lambda line: logger.warning("%s", line))
    checkpoints = CompleteCheckpoints(note, run)
    trainer.add_callback(checkpoints)
    keep_options(trainer)
    trainer.train = _verified_train(trainer, checkpoints, allow, note)  # type: ignore[method-assign]
    return guard


def _verified_train(
    trainer: Trainer, checkpoints: CompleteCheckpoints, allow: Collection[str], note: Callable[[str], None]
) -> Callable[..., Any]:
    """The trainer's `train`, which on its own would also resume from an interrupted save.

    With True, resumes from the newest verified checkpoint; a named one must only be loadable.
    """
    train, compares = trainer.train, checkpoints.run is None

    @functools.wraps(train)
    def verified_train(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            found = whole_checkpoint(
                str(trainer.args.output_dir),
                asked="resume_from_checkpoint=True",
                remedy="leave it out, or name the folder of one",
            )
            for line in found.passed_over:
                note(f"passed over {line}")
            resume_from_checkpoint = str(found.path)
        elif resume_from_checkpoint and compares:
            defect = find_content_defect(Path(resume_from_checkpoint))
            if defect is not None:
                raise InputError(f"{resume_from_checkpoint} cannot be resumed from: {defect}; name an older one")
        if compares:
            checkpoints.run = fingerprints_of_trainer(trainer)
            if resume_from_checkpoint:
                remedy = "start anew in another output_dir, or give protect's allow the names {}"
                check_same_run(Path(resume_from_checkpoint), checkpoints.run, allow, remedy=remedy)
        checkpoints.begun = False
        try:
            return train(resume_from_checkpoint, *args, **kwargs)
        except (InputError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            if checkpoints.begun or not resume_from_checkpoint:
                raise
            raise InputError(
                f"{resume_from_checkpoint} does not fit this model and method: {error}; name another checkpoint"
            ) from error

    return verified_train
