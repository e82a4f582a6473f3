"""TRL's stock `SFTTrainer`, made of what was prepared, and the one held-out loss of its evaluations."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

from qriemann.distributed import sum_over_processes
from qriemann.errors import InputError
from qriemann.training.prepare import Prepared
from qriemann.upstream import token_sums, without_telemetry


def build_trainer(
    prepared: Prepared, callbacks: Sequence[TrainerCallback] = (), *, args: SFTConfig | None = None
) -> SFTTrainer:
    """The trainer of a run, with one held-out loss and without the callbacks that draw bars and print dicts."""
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


class HeldOutLoss:
    """Makes a trainer's evaluations count every token once.

    transformers averages the means of batches and repeats rows to fill the last batch of each process, so its loss depends
    on the size of a batch. TRL also adds what belongs to training alone: the auxiliary loss of experts, label smoothing.
    """

    def __init__(self, trainer: SFTTrainer) -> None:
        self._trainer = trainer
        self._run_loop, self._take_step = trainer.evaluation_loop, trainer.prediction_step
        trainer.evaluation_loop, trainer.prediction_step = self._loop, self._step
        self._sums = torch.zeros(())

    def _loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        if dataloader.batch_sampler is not None:
            # accelerate would fill the last batches with rows of the first.
            dataloader.batch_sampler.even_batches = False
        self._sums = torch.zeros(4, dtype=torch.float64, device=self._trainer.args.device)
        output = self._run_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        negative_log_likelihood, tokens, entropy, right = sum_over_processes(self._sums).tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = negative_log_likelihood / tokens
            output.metrics[f"{metric_key_prefix}_entropy"] = entropy / tokens
            output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = right / tokens
        return output

    def _step(self, model: Any, inputs: Any, prediction_loss_only: bool, **kwargs: Any) -> tuple[Any, Any, Any]:
        if not prediction_loss_only:
            return self._take_step(model, inputs, prediction_loss_only, **kwargs)
        self._sums = self._sums + token_sums(self._trainer, model, inputs)
        # Without a loss the loop gathers nothing, so the processes may have different numbers of batches.
        return None, None, None
