"""TRL's stock `SFTTrainer`, made of what was prepared."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

from qriemann.errors import InputError
from qriemann.training.held_out_loss import HeldOutLoss
from qriemann.training.prepare import Prepared
from qriemann.upstream import without_telemetry


def build_trainer(
    prepared: Prepared, callbacks: Sequence[TrainerCallback] = (), *, args: SFTConfig | None = None
) -> SFTTrainer:
    """The trainer of a run, with one held-out loss and without the callbacks that draw bars and print dicts.

    Args:
        prepared: from `prepare`.
        callbacks: of the trainer.
        args: other arguments than those prepared.

    Raises:
        InputError: TRL finds that arguments, model and data do not fit each other, or misses a package, or this is the
            second trainer.
    """
    # PEFT puts the adapter into the very model that was prepared, and leaves its configuration there.
    if prepared.adapter is not None and hasattr(prepared.model, "peft_config"):
        raise InputError("what was prepared serves for one check or one training; call prepare again for another")
    try:
        with without_telemetry():
            trainer = SFTTrainer(
                model=prepared.model,
                processing_class=prepared.tokenizer,
                args=args or prepared.args,
                train_dataset=prepared.data.train,
                eval_dataset=prepared.data.held_out,
                peft_config=prepared.adapter,
                optimizer_cls_and_kwargs=prepared.optimizer,
                callbacks=list(callbacks),
            )
    except InputError:
        raise
    # TRL checks the arguments against each other and against the model here, and says what to do.
    except (ValueError, ImportError) as error:
        raise InputError(f"the training arguments do not fit the model and the data: {error}") from error
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    HeldOutLoss(trainer)
    return trainer
