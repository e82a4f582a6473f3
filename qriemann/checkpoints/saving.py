"""Saving: completes what the trainer writes and deletes older checkpoints, or stops the run with the reason."""

import os
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from qriemann.base.tensors import find_not_finite
from qriemann.checkpoints.continued import find_best_again, follow_settings, is_new_best
from qriemann.checkpoints.manifest import commit, last_complete, rotate
from qriemann.distributed import wait_for_all
from qriemann.errors import InputError
from qriemann.folder.files import open_like_its_folder, sync
from qriemann.geometry.parameter import fixed_rank_parameters, orthonormality_drift

# A step keeps max |U^T U - I| below 1e-5; beyond this U S V^T is no longer the point that the optimizer believes in.
DRIFT_LIMIT = 1e-3


class CompleteCheckpoints(TrainerCallback):
    """Completes what the trainer saves, and deletes older checkpoints instead of the trainer.

    With load_best_model_at_end it saves at every evaluation that is the best so far: the trainer would load the best of
    those steps that happen to be saved.

    A point that left the manifold, or a trained tensor or optimizer state that is not finite, stops the run before its
    checkpoint is complete.
    """

    def __init__(self, report: Callable[[str], None], run: Mapping[str, Any] | None = None) -> None:
        self._report, self.run, self.begun = report, run, False
        self._keep: int | None = None
        self._completed_step: int | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The trainer deletes older checkpoints before the new one is known to be whole.
        if args.save_total_limit:
            self._keep, args.save_total_limit = args.save_total_limit, None
        if state.global_step > state.max_steps:
            raise InputError(
                f"resume must find a checkpoint within the run's {state.max_steps} steps, got step {state.global_step}; "
                "raise max_steps or num_train_epochs, or name an older one"
            )
        if state.global_step:
            follow_settings(args, state, kwargs["optimizer"], kwargs["lr_scheduler"])
            find_best_again(args, state, self._report)
        self.begun = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.load_best_model_at_end and self._completed_step != state.global_step:
            control.should_save |= is_new_best(args, state, kwargs["metrics"])

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Saving this step again would overwrite its complete checkpoint.
        if control.should_save and self._completed_step == state.global_step:
            control.should_save = False

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        defect = find_numeric_defect(kwargs["model"], kwargs["optimizer"])
        if defect is not None:
            raise InputError(
                f"what is saved must be finite, and factors orthonormal, got {defect} at step {state.global_step}; "
                f"{last_complete(str(args.output_dir))}"
            )
        # Each process writes the state of its own generators into the folder.
        wait_for_all()
        # Set in every process, or one would save this step again and hang at the barrier.
        self._completed_step = state.global_step
        if not args.should_save:
            return
        folder = Path(args.output_dir)
        try:
            commit(folder / f"checkpoint-{state.global_step}", state.global_step, self.run)
        except OSError as error:
            raise save_failed(folder, error) from error
        if self._keep:
            best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
            for problem in rotate(folder, self._keep, spare=best):
                self._report(problem)


def is_failed_save(error: BaseException) -> bool:
    """Whether the exception was raised while the trainer wrote a checkpoint or an adapter."""
    saving = ("_save_checkpoint", "save_model")
    inside = any(frame.f_code.co_name in saving for frame, _ in traceback.walk_tb(error.__traceback__))
    # torch and safetensors report a full disk by their own exceptions.
    return inside and isinstance(error, OSError | RuntimeError | SafetensorError)


def save_failed(folder: Path, error: BaseException) -> InputError:
    """The error for a checkpoint that could not be written."""
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return InputError(
        f"cannot write the checkpoint: {reason} ({last_complete(folder)}); fix this, then rerun with --resume"
    )


def find_numeric_defect(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str | None:
    """Names numbers that are not finite or factors that are not orthonormal, which must not be saved; None without any."""
    points = fixed_rank_parameters(model.parameters())
    content: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names: dict[Tensor, str] = {parameter: name for name, parameter in content.items()}
    for point in points:
        content |= {f"the core of {point.name}": point.s, f"the offset of {point.name}": point.offset}
    for parameter, entry in ({} if optimizer is None else optimizer.state).items():
        content[f"the optimizer's state of {names.get(parameter, 'a tensor')}"] = entry
    broken = find_not_finite(content)
    if broken is not None:
        return f"numbers that are not finite in {broken}"
    drift = orthonormality_drift(points).item()
    return None if drift <= DRIFT_LIMIT else f"max |U^T U - I| = {drift:.1e}"


def save_adapter(trainer: Trainer, folder: Path) -> None:
    """Saves the trained adapter into the folder; replaces each file in one move, so none is ever half written."""
    if not trainer.args.should_save:
        return
    partial = folder / ".adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    trainer.save_model(str(partial))
    for path in sorted(partial.iterdir()):
        open_like_its_folder(path)
        sync(path)
        os.replace(path, folder / path.name)
    partial.rmdir()
    sync(folder)
