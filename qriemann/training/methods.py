"""The methods by name: what each does, its defaults with their sources, and the scale that its learning rate lives on.

A new method is an optimizer class with a `check_options` and one entry in METHODS.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qriemann.errors import InputError
from qriemann.optim import AdamW, Muon, Riemannion, RiemannLoRA, ScaledAdamW, ScaledGD
from qriemann.optim.factors import FactorOptimizer
from qriemann.optim.fixed_rank import FixedRankOptimizer

logger = logging.getLogger(__name__)

# A rate copied from a method on another scale is off by 50 to 500; a rate tuned for a task, by less than 30.
_FAR = 30.0


@dataclass(frozen=True)
class Default:
    """An option's value when none is given, and where it comes from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        optimizer: the class; called with the PEFT model and options.
        does: one line on the step.
        lr_scale: what a learning rate is a measure of.
        state: what the optimizer keeps of each factor.
        take_when: one line on when to choose it.
        defaults: by option; what is not named here has the class's default.
    """

    optimizer: type[FixedRankOptimizer] | type[FactorOptimizer]
    does: str
    lr_scale: str
    state: str
    take_when: str
    defaults: Mapping[str, Default]

    @property
    def on_manifold(self) -> bool:
        """Whether the adapter is a point U S V^T with a start, rather than plain LoRA factors."""
        return issubclass(self.optimizer, FixedRankOptimizer)

    def options(self) -> dict[str, Any]:
        """Every option with its default."""
        parameters = inspect.signature(self.optimizer).parameters
        own = {key: p.default for key, p in parameters.items() if key not in ("params", *_START)}
        return own | {key: default.value for key, default in self.defaults.items()}


# How a point starts; no options of the step.
_START = ("start", "alpha", "seed")

_PAPER = "arXiv 2507.12142 v2, Llama-3-8B"
_SCALED = "reference code of arXiv 2402.02347"
_NO_DECAY = Default(0.0, "decay of X moves the function away from the start's when the start is an offset")

METHODS: dict[str, Method] = {
    "riemannion": Method(
        Riemannion,
        does="Muon's orthogonalized momentum on the manifold of rank-r matrices",
        lr_scale="the spectral norm of one step of X",
        state="1 block",
        take_when="the default; one rate for all layers and ranks, no dependence on how X is factored",
        defaults={
            "lr": Default(
                5e-3,
                "recipes/results/cpu: 6e-3 to 1.2e-2 do best in 60 steps; the paper takes 1e-4 for 5,300: about 0.6 / steps",
            ),
            "momentum": Default(0.9, _PAPER),
            "weight_decay": _NO_DECAY,
        },
    ),
    "lora-tsd": Method(
        Riemannion,
        does="riemannion with three rounds of polar and tangent projection a step",
        lr_scale="the spectral norm of one step of X",
        state="1 block",
        take_when="a direction nearer to the steepest one of the tangent space is worth a slightly dearer step",
        defaults={
            "lr": Default(5e-3, "as riemannion, whose step has the same norm; not measured"),
            "momentum": Default(0.9, "as riemannion; not measured"),
            "weight_decay": _NO_DECAY,
            "tangent_iterations": Default(3, "arXiv 2609.02734: 3 to 5"),
        },
    ),
    "riemannlora": Method(
        RiemannLoRA,
        does="averaged Riemannian gradient, each block divided by its root mean square norm",
        lr_scale="the Frobenius norm of a block of one step of X",
        state="1 block",
        take_when="the first version of the paper is to be reproduced",
        defaults={
            "lr": Default(1e-2, "the order of riemannion's, whose step is a matrix of the same space; not measured"),
            "momentum": Default(0.9, "as riemannion; not measured"),
            "weight_decay": _NO_DECAY,
        },
    ),
    "scaled-gd": Method(
        ScaledGD,
        does="gradient descent on the factors, preconditioned by r x r Gram matrices",
        lr_scale="the share of a preconditioned gradient, which has the scale of the loss",
        state="none, 1 block with momentum",
        take_when="memory for any state is short, or the plainest step independent of the factors is wanted",
        defaults={
            "lr": Default(1e-2, f"{_SCALED}: the largest of the three that its training-loss figure compares"),
            "momentum": Default(0.0, f"{_SCALED}: none"),
            "weight_decay": Default(0.01, f"{_SCALED}: all its language-model runs"),
        },
    ),
    "scaled-adamw": Method(
        ScaledAdamW,
        does="AdamW on the factors, its gradients preconditioned by r x r Gram matrices",
        lr_scale="the change of a factor's entry in one step",
        state="2 blocks",
        take_when="AdamW is wanted with less dependence on the scales of the two factors",
        defaults={
            "lr": Default(5e-5, f"{_SCALED}: Mistral-7B in NF4"),
            "betas": Default((0.9, 0.999), f"{_SCALED}: Mistral-7B in NF4"),
            "weight_decay": Default(0.01, f"{_SCALED}: Mistral-7B in NF4"),
        },
    ),
    "adamw": Method(
        AdamW,
        does="torch's fused AdamW on the factors; lora_plus_ratio=16 is LoRA+",
        lr_scale="the change of a factor's entry in one step",
        state="2 blocks",
        take_when="a baseline is wanted, or the settings of a LoRA run are to be kept",
        defaults={
            "lr": Default(2e-4, "QLoRA, arXiv 2305.14314: NF4 models up to 13B"),
            "betas": Default((0.9, 0.999), "torch.optim.AdamW"),
            "weight_decay": Default(0.0, "transformers' TrainingArguments"),
            "lora_plus_ratio": Default(1.0, "plain LoRA; LoRA+, arXiv 2402.12354, recommends 16"),
        },
    ),
    "muon": Method(
        Muon,
        does="torch's Muon on each factor by itself",
        lr_scale="the spectral norm of one step of a factor",
        state="1 block",
        take_when="a baseline is wanted for what the manifold adds to orthogonalization",
        defaults={
            "lr": Default(1e-3, "torch.optim.Muon"),
            "momentum": Default(0.95, "torch.optim.Muon"),
            "weight_decay": Default(0.1, "torch.optim.Muon"),
        },
    ),
}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: there is none; it says which is meant, if one looks alike.
    """
    if name not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {name!r}{_hint(name, METHODS)}")
    return METHODS[name]


def resolve_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method's constructor: what was given, and the table's defaults for the rest.

    Args:
        name: of the method.
        given: by option; None stands for "not given".

    Raises:
        InputError: an option that the method does not have, or a value out of range.
    """
    method, given = find_method(name), {key: value for key, value in given.items() if value is not None}
    known = method.options()
    for key in given:
        if key in _START and not method.on_manifold:
            on_manifold = ", ".join(other for other, row in METHODS.items() if row.on_manifold)
            raise InputError(
                f"{key} must be left out for {name}, got {given[key]!r}; only methods on the manifold have a start: "
                f"{on_manifold}"
            )
        if key not in known and key not in _START:
            raise InputError(f"{key} is not an option of {name}; known: {', '.join(known)}{_hint(key, known)}")
    merged = {**known, **{key: value for key, value in given.items() if key not in _START}}
    # A class that has AdamW for some parameters only names its rates so, and its param groups have the plain names.
    plain_names = {"adamw_betas": "betas", "adamw_eps": "eps"}
    method.optimizer.check_options({plain_names.get(key, key): value for key, value in merged.items()})
    _warn_of_another_scale(name, method, merged["lr"])
    return {key: default.value for key, default in method.defaults.items()} | given


def _warn_of_another_scale(name: str, method: Method, lr: Any) -> None:
    usual = method.defaults["lr"].value
    if not usual / _FAR < lr < usual * _FAR:
        logger.warning(
            "lr=%g is more than %g times off the %g of %s, where it is %s; is it meant for another method?",
            *(lr, _FAR, usual, name, method.lr_scale),
        )


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
