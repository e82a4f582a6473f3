"""The seam into stock TRL and transformers trainers: two arguments, no subclass.

    trainer = SFTTrainer(..., optimizer_cls_and_kwargs=qriemann.for_trainer("riemannion", lr=5e-3))

`FixedRankCallback` is needed only to resume from checkpoints saved with an offset on a base that `load_base` did not load.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qriemann.adapters.attach import accept_offset_checkpoints
from qriemann.errors import InputError
from qriemann.optim.riemannion import Riemannion, check_options

#: Methods by name, with their optimizer.
METHODS: dict[str, type[Riemannion]] = {"riemannion": Riemannion}


class OptimizerFactory:
    """What transformers' Trainer calls as `OptimizerFactory()(model, **kwargs)` when it creates its optimizer.

    TRL casts every trainable parameter of a 4-bit model to bf16 in its constructor. This runs later, so it is where the
    factors become float32 and orthonormal.
    """

    def __call__(self, model: nn.Module, *, method: str, **options: Any) -> torch.optim.Optimizer:
        return METHODS[method](model, **options)


def for_trainer(
    method: str = "riemannion",
    *,
    lr: float | None = None,
    start: str = "offset",
    alpha: float = 1.0,
    seed: int | None = None,
    **options: Any,
) -> tuple[type, dict[str, Any]]:
    """The value of `optimizer_cls_and_kwargs` for a stock trainer.

    Args:
        method: a name in METHODS.
        lr: spectral norm of one step of X; None takes the method's default. The trainer's scheduler scales it.
        start: "offset" (random bases, S = alpha I, the same point subtracted as a frozen offset; saves rank 2 r) or
            "zero" (S = 0); see `qriemann.attach`.
        alpha: scale of S for "offset".
        seed: of the random bases; None takes one from torch's global generator, which the trainer seeds.
        **options: as in the method's optimizer class.

    Raises:
        InputError: an unknown method or option, or a value out of range; before any model is loaded.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}{_nearest(method, METHODS)}")
    parameters = inspect.signature(METHODS[method]).parameters
    known = {key: p.default for key, p in parameters.items() if key not in ("params", "start", "alpha", "seed")}
    for key in options:
        if key not in known:
            raise InputError(f"{key} is not an option of {method}; known: {', '.join(known)}{_nearest(key, known)}")
    if lr is not None:
        options["lr"] = lr
    options = {key: value for key, value in options.items() if value is not None}
    merged = {**known, **options}
    check_options({key.replace("adamw_betas", "betas").replace("adamw_eps", "eps"): v for key, v in merged.items()})
    if start not in ("zero", "offset"):
        raise InputError(f"start must be 'zero' or 'offset', got {start!r}")
    if not 0 < alpha < float("inf"):
        raise InputError(f"alpha must be a finite number > 0, got {alpha!r}")
    return OptimizerFactory, {"method": method, "start": start, "alpha": alpha, "seed": seed, **options}


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def default_lr(method: str) -> float:
    """The learning rate that `for_trainer` takes when none is given."""
    return inspect.signature(METHODS[method]).parameters["lr"].default


class FixedRankCallback(TrainerCallback):
    """Lets a trainer resume from a checkpoint whose adapter was saved with an offset (rank 2 r)."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accept_offset_checkpoints(kwargs["model"])


def fixed_rank_optimizer(optimizer: Any) -> Riemannion | None:
    """The optimizer under accelerate's wrappers, if it steps on the manifold."""
    while optimizer is not None and not isinstance(optimizer, Riemannion):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
