"""What a resumed run takes from its settings instead of its checkpoint: the optimizer's options, rates, intervals.

Changes that were not allowed have been refused earlier; without changes, every number equals the checkpoint's.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, TrainingArguments

from qriemann.checkpoints.manifest import read_manifest


def keep_options(trainer: Trainer) -> None:
    """Keeps the options of the trainer's optimizer when the state of a checkpoint is loaded into it."""
    create = trainer.create_optimizer

    @functools.wraps(create)
    def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        missing = trainer.optimizer is None
        optimizer = create(*args, **kwargs)
        if missing:
            _keep_options_of(optimizer)
        return optimizer

    trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]
    if trainer.optimizer is not None:
        _keep_options_of(trainer.optimizer)


def _keep_options_of(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    optimizer.register_load_state_dict_pre_hook(_with_own_options)


def _with_own_options(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state with the optimizer's own options; a scheduled rate stays in proportion to its initial value."""
    groups = []
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        rate, began, begins = saved["lr"], saved.get("initial_lr"), own["initial_lr"]
        if began and began != begins:
            rate = rate / began * begins
        groups.append({**saved, **{key: value for key, value in own.items() if key != "params"}, "lr": rate})
    # torch says what is wrong with another number of groups.
    return {**state_dict, "param_groups": groups + state_dict["param_groups"][len(groups) :]}


def follow_settings(
    args: TrainingArguments, state: TrainerState, optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    """Continues along the schedule and the intervals of this run's settings from the step that it resumes at.

    The trainer's own resume keeps the base rate, the rate of the next step and the intervals of the checkpoint, so an
    extended run would take a step at the rate 0 that the old schedule ended with.
    """
    state.compute_steps(args, state.max_steps)
    # Other schedulers move the rate by what they see of the loss.
    if isinstance(scheduler, LambdaLR):
        bases = [group["initial_lr"] for group in optimizer.param_groups]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(bases, factors, strict=True)]
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": bases, "_last_lr": rates})
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def find_best_again(args: TrainingArguments, state: TrainerState, note: Callable[[str], None]) -> None:
    """Finds the best checkpoint of a run whose folder was moved; without it, lets the next evaluation be the best."""
    if not args.load_best_model_at_end or state.best_metric is None or state.best_model_checkpoint is not None:
        return
    moved = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
    if read_manifest(moved) is not None:
        state.best_model_checkpoint = str(moved)
        return
    note(
        f"the best checkpoint so far, that of step {state.best_global_step}, is gone: the best of the steps from here on is "
        "kept"
    )
    state.best_metric = state.best_global_step = None


def is_new_best(args: TrainingArguments, state: TrainerState, metrics: dict[str, float]) -> bool:
    """Whether an evaluation is better than those before it, by the trainer's own rule."""
    name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
    value, best = metrics.get(name), state.best_metric
    if value is None or not state.global_step:
        return False
    return best is None or (value > best if args.greater_is_better else value < best)
