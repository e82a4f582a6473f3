"""The seam into stock TRL and transformers trainers: two arguments, no subclass.

    trainer = SFTTrainer(..., optimizer_cls_and_kwargs=qriemann.for_trainer("riemannion"))

`FixedRankCallback` is needed only to resume from checkpoints saved with an offset on a base that `load_base` did not load.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qriemann.adapters.attach import accept_offset_checkpoints, check_start
from qriemann.distributed import refuse_sharding, same_seed
from qriemann.optim.fixed_rank import FixedRankOptimizer
from qriemann.optim.methods import find_method, resolve_options

logger = logging.getLogger(__name__)


class OptimizerFactory:
    """What transformers' Trainer calls as `OptimizerFactory()(model, **kwargs)` when it creates its optimizer.

    TRL casts every trainable parameter of a 4-bit model to bf16 in its constructor. This runs later, so it is where the
    factors become float32 and, for a method on the manifold, orthonormal.
    """

    def __call__(self, model: nn.Module, *, method: str, **options: Any) -> torch.optim.Optimizer:
        refuse_sharding()
        _warn_of_checkpointing(model)
        entry = find_method(method)
        if entry.on_manifold:
            # DDP makes the factors equal, and knows nothing of the cores and offsets that belong to them.
            options["seed"] = same_seed(options.get("seed"))
        return entry.optimizer(model, **options)


def _warn_of_checkpointing(model: nn.Module) -> None:
    """Warns of what gradient checkpointing, on by default in TRL, costs on a CPU."""
    on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if on and next(model.parameters()).device.type == "cpu":
        logger.warning(
            "gradient checkpointing is on: on a CPU a step takes half as long again; where memory allows, set "
            "gradient_checkpointing=False"
        )


def for_trainer(
    method: str = "riemannion",
    *,
    lr: float | None = None,
    start: str | None = None,
    alpha: float | None = None,
    seed: int | None = None,
    **options: Any,
) -> tuple[type, dict[str, Any]]:
    """The value of `optimizer_cls_and_kwargs` for a stock trainer.

    Args:
        method: a name in `qriemann.optim.methods.METHODS`: riemannion, lora-tsd, riemannlora, scaled-gd, scaled-adamw,
            adamw or muon.
        lr: on the method's own scale; None takes the method's default. The trainer's scheduler scales it.
        start: for a method on the manifold, "zero" (S = 0; the default) or "offset" (S = alpha I, the same point
            subtracted as a frozen offset; saves rank 2 r); see `qriemann.attach`.
        alpha: scale of S for "offset"; 1 by default.
        seed: of the random bases; None takes one from torch's global generator, which the trainer seeds.
        **options: as in the method's optimizer class.

    Raises:
        InputError: an unknown method or option, or a value out of range; before any model is loaded.
    """
    resolved = resolve_options(method, {"lr": lr, "start": start, "alpha": alpha, "seed": seed, **options})
    if find_method(method).on_manifold:
        resolved = {"start": "zero", "alpha": 1.0, **resolved}
        check_start(resolved["start"], resolved["alpha"])
    return OptimizerFactory, {"method": method, **resolved}


class FixedRankCallback(TrainerCallback):
    """Lets a trainer resume from a checkpoint whose adapter was saved with an offset (rank 2 r)."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accept_offset_checkpoints(kwargs["model"])


def fixed_rank_optimizer(optimizer: Any) -> FixedRankOptimizer | None:
    """The optimizer under accelerate's wrappers, if it steps on the manifold."""
    inner = unwrapped(optimizer, "optimizer")
    return inner if isinstance(inner, FixedRankOptimizer) else None


def unwrapped(wrapped: Any, attribute: str) -> Any:
    """What accelerate wraps: the innermost optimizer or scheduler, which each wrapper holds under that name."""
    while hasattr(wrapped, attribute):
        wrapped = getattr(wrapped, attribute)
    return wrapped
