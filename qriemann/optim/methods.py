"""The methods by name: the optimizer of each, and its defaults with their sources.

A new method is a `FixedRankOptimizer` or a `FactorOptimizer` with its `lr_scale`, the ranges of its options in
`optim.options`, and an entry in METHODS.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_origin, get_type_hints

from torch import Tensor

from qriemann.config.values import coerce
from qriemann.errors import InputError
from qriemann.optim import AdamW, Muon, Riemannion, RiemannLoRA, ScaledAdamW, ScaledGD
from qriemann.optim.factors import FactorOptimizer
from qriemann.optim.fixed_rank import FixedRankOptimizer
from qriemann.optim.options import check_options, warn_of_another_scale


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
        state_blocks: blocks of a factor's size that the optimizer keeps of each factor.
        defaults: by option; an option that is not named here has the class's default.
        momentum_is_optional: whether a run with momentum 0 keeps no state at all.
    """

    optimizer: type[FixedRankOptimizer] | type[FactorOptimizer]
    state_blocks: int
    defaults: Mapping[str, Default]
    momentum_is_optional: bool = False

    def kept_blocks(self, momentum: float | None) -> int:
        """`state_blocks` of a run with that momentum; None takes the default."""
        chosen = self.defaults["momentum"].value if momentum is None and self.momentum_is_optional else momentum
        return 0 if self.momentum_is_optional and not chosen else self.state_blocks

    @property
    def on_manifold(self) -> bool:
        """Whether the adapter is a point U S V^T with a start, rather than plain LoRA factors."""
        return issubclass(self.optimizer, FixedRankOptimizer)

    def options(self) -> dict[str, Any]:
        """Every option with its default."""
        parameters = inspect.signature(self.optimizer).parameters
        own = {key: p.default for key, p in parameters.items() if key not in ("params", *_START)}
        return own | {key: default.value for key, default in self.defaults.items()}


# These say how a point starts; they are not options of the step.
_START = ("start", "alpha", "seed")

_PAPER = "arXiv 2507.12142 v2, Llama-3-8B"
_SCALED = "reference code of arXiv 2402.02347"
_NO_DECAY = Default(0.0, "decay of X moves the function away from the start's when the start is an offset")

METHODS: dict[str, Method] = {
    "riemannion": Method(
        Riemannion,
        state_blocks=1,
        defaults={
            "lr": Default(5e-3, "recipes/results/beds: 100 to 1,000 steps; few adapted layers take more"),
            "momentum": Default(0.9, _PAPER),
            "weight_decay": _NO_DECAY,
        },
    ),
    "lora-tsd": Method(
        Riemannion,
        state_blocks=1,
        defaults={
            "lr": Default(5e-3, "as riemannion: recipes/results/cpu, the same losses at the same rates"),
            "momentum": Default(0.9, "as riemannion"),
            "weight_decay": _NO_DECAY,
            "tangent_iterations": Default(3, "arXiv 2609.02734: 3 to 5"),
        },
    ),
    "riemannlora": Method(
        RiemannLoRA,
        state_blocks=1,
        defaults={
            "lr": Default(
                1e-2, "recipes/results/cpu: 3e-2 is the best of three over 60 steps, 1e-2 next; longer runs want less"
            ),
            "momentum": Default(0.9, "as riemannion"),
            "weight_decay": _NO_DECAY,
        },
    ),
    "scaled-gd": Method(
        ScaledGD,
        state_blocks=1,
        momentum_is_optional=True,
        defaults={
            "lr": Default(1e-2, f"{_SCALED}: the largest of the three that its training-loss figure compares"),
            "momentum": Default(0.0, f"{_SCALED}: none"),
            "weight_decay": Default(0.01, f"{_SCALED}: all its language-model runs"),
        },
    ),
    "scaled-adamw": Method(
        ScaledAdamW,
        state_blocks=2,
        defaults={
            "lr": Default(5e-5, f"{_SCALED}: Mistral-7B in NF4"),
            "betas": Default((0.9, 0.999), f"{_SCALED}: Mistral-7B in NF4"),
            "weight_decay": Default(0.01, f"{_SCALED}: Mistral-7B in NF4"),
        },
    ),
    "adamw": Method(
        AdamW,
        state_blocks=2,
        defaults={
            "lr": Default(2e-4, "QLoRA, arXiv 2305.14314: NF4 models up to 13B"),
            "betas": Default((0.9, 0.999), "torch.optim.AdamW"),
            "weight_decay": Default(0.0, "transformers' TrainingArguments"),
            "lora_plus_ratio": Default(1.0, "plain LoRA; LoRA+, arXiv 2402.12354, recommends 16"),
        },
    ),
    "muon": Method(
        Muon,
        state_blocks=1,
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
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {name!r}{_hint(name, METHODS)}")
    return METHODS[name]


def resolve_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method's constructor: what was given, and the table's defaults for the rest.

    Args:
        name: of the method.
        given: by option; None stands for "not given".

    Raises:
        InputError: an option that the method does not have, or a value of another type or out of range.
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
    hints = get_type_hints(method.optimizer.__init__)
    given = {key: value if key == "start" else _as_declared(key, value, hints[key]) for key, value in given.items()}
    merged = {**known, **{key: value for key, value in given.items() if key not in _START}}
    check_options(merged)
    warn_of_another_scale(method.optimizer, merged, method.optimizer.lr_scale)
    return {key: default.value for key, default in method.defaults.items()} | given


def _as_declared(key: str, value: Any, hint: Any) -> Any:
    """An option as people write it, in the type that the constructor declares: YAML reads 1e-4 as a string."""
    if isinstance(value, Tensor):  # a learning rate that changes between the replays of a CUDA graph
        return value
    try:
        return coerce(hint, value)
    except ValueError as error:
        rule = "two numbers" if get_origin(hint) is tuple else error
        raise InputError(f"{key} must be {rule}, got {value!r}") from None


def _hint(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
