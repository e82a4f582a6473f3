"""What happens when the trainer saves: the checkpoint is completed and older ones go, or the run stops with the reason."""

import os
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qriemann.base.finite import find_not_finite
from qriemann.checkpoints.manifest import commit, newest_checkpoint, rotate
from qriemann.distributed import wait_for_all
from qriemann.errors import InputError
from qriemann.folder.files import open_like_its_folder, sync
from qriemann.geometry.parameter import fixed_rank_parameters, orthonormality_drift

# What torch's optimizers keep in the shape of a parameter.
_ELEMENTWISE = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
# A step keeps max |U^T U - I| below 1e-5; beyond this U S V^T is no longer the point that the optimizer believes in.
DRIFT_LIMIT = 1e-3


class CompleteCheckpoints(TrainerCallback):
    """Completes what the trainer saves, and takes over the deletion of older checkpoints.

    A point that left the manifold, or a trained tensor or optimizer state that is not finite, stops the run: its checkpoint
    is not completed, and nothing repairs it.

    Args:
        report: takes one line about what could not be done and did not stop the run.
        run: see `commit`.

    Attributes:
        begun: whether the trainer has loaded all that it resumes from.
    """

    def __init__(self, report: Callable[[str], None], run: Mapping[str, Any] | None = None) -> None:
        self._report, self.run, self.begun = report, run, False
        self._keep: int | None = None
        self._completed_step: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The trainer deletes older checkpoints before anyone can know whether the new one is whole.
        if args.save_total_limit:
            self._keep, args.save_total_limit = args.save_total_limit, None
        if state.global_step > state.max_steps:
            raise InputError(
                f"resume must find a checkpoint within the run's {state.max_steps} steps, got one of step "
                f"{state.global_step}; raise max_steps or num_train_epochs, or name an older one"
            )
        for entry in kwargs["optimizer"].state.items():
            _check_shapes(*entry)
        self.begun = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The same step once more would be written over the complete checkpoint of this step.
        if control.should_save and self._completed_step == state.global_step:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        defect = find_numeric_defect(kwargs["model"], kwargs["optimizer"])
        if defect is not None:
            raise InputError(
                f"what is saved must be finite, and factors orthonormal, got {defect} at step {state.global_step}; "
                f"{_go_on_from(Path(args.output_dir))}"
            )
        # Each process writes the state of its own generators into the folder.
        wait_for_all()
        # In every process: one that did not know would save a second time, and wait for the others.
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


def _check_shapes(parameter: Tensor, entry: Mapping[str, Any]) -> None:
    """Raises InputError if loaded state does not fit the parameter, which torch's optimizers do not look at."""
    for key in _ELEMENTWISE & entry.keys():
        found = tuple(entry[key].shape) if isinstance(entry[key], Tensor) else type(entry[key]).__name__
        if found != tuple(parameter.shape):
            raise InputError(
                f"the optimizer's state must fit the model, got {key} of {found} for a tensor of {tuple(parameter.shape)}; "
                "resume from the checkpoint of a run of this model"
            )


def is_failed_save(error: BaseException) -> bool:
    """Whether the exception came out of the trainer's writing of a checkpoint or of an adapter."""
    saving = ("_save_checkpoint", "save_model")
    inside = any(frame.f_code.co_name in saving for frame, _ in traceback.walk_tb(error.__traceback__))
    # torch and safetensors write by themselves, and raise these.
    return inside and isinstance(error, OSError | RuntimeError | SafetensorError)


def save_failed(folder: Path, error: BaseException) -> InputError:
    """What to tell when a checkpoint could not be written."""
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return InputError(
        f"output_dir must have room for a checkpoint and be writable, got: {reason}; mend that, then {_go_on_from(folder)}"
    )


def _go_on_from(folder: Path) -> str:
    last = newest_checkpoint(folder).path
    if last is None:
        return f"begin anew: {folder} holds no complete checkpoint"
    return f"--resume goes on from the last complete checkpoint, {last}"


def find_numeric_defect(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str | None:
    """What must not be saved as trained, or None: numbers that are not finite, factors that are not orthonormal.

    Args:
        model: whose trainable tensors and points are looked at.
        optimizer: whose state is, too.

    Cost: one pass over these tensors and one host synchronization for each.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    points = fixed_rank_parameters(model.parameters())
    names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
    content: dict[str, Any] = {
        **trained,
        **{f"the core of {point.name}": point.s for point in points},
        **{f"the offset of {point.name}": list(point.offset) for point in points if point.offset is not None},
    }
    for parameter, entry in ({} if optimizer is None else optimizer.state).items():
        content[f"the optimizer's state of {names.get(parameter, 'a tensor')}"] = entry
    broken = find_not_finite(content)
    if broken is not None:
        return f"numbers that are not finite in {broken}"
    drift = orthonormality_drift(points)
    return None if drift <= DRIFT_LIMIT else f"max |U^T U - I| = {drift:.1e}"


def save_adapter(trainer: Trainer, folder: Path) -> None:
    """Saves the trained adapter into the folder; each file is replaced in one move, so none is ever half of one."""
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
