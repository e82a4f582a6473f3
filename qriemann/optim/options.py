"""Options of a param group: their ranges, and a warning where a learning rate is on another method's scale."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qriemann.errors import InputError
from qriemann.ops.core import MomentumForm

DampingForm = Literal["absolute", "relative"]
LearningRateAdjustment = Literal["original", "match_rms_adamw"]

logger = logging.getLogger(__name__)

_FINITE = ("lr", "weight_decay", "eps", "damping", "norm_eps", "lora_plus_ratio")
_BELOW_ONE = ("momentum", "beta2")
_CHOICES = {
    "momentum_form": get_args(MomentumForm),
    "damping_form": get_args(DampingForm),
    "adjust_lr_fn": (None, *get_args(LearningRateAdjustment)),
}
# What a constructor takes beside them.
_NO_OPTIONS = ("self", "__class__", "params", "use_triton", "capturable", "start", "alpha", "seed")
# A rate copied from a method on another scale is off by 50 to 500; a rate tuned for a task, by less than 30.
_FAR = 30.0


def options_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a param group among the `locals()` of a constructor that does nothing before."""
    return {key: value for key, value in arguments.items() if key not in _NO_OPTIONS}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises InputError for an option out of range, whichever method it belongs to; `adamw_x` has the range of `x`."""
    for key, value in options.items():
        name = key.removeprefix("adamw_")
        # A tensor may lie on a device that would have to be waited for.
        if name in _FINITE and not isinstance(value, Tensor) and not 0 <= value < float("inf"):
            raise InputError(f"{key} must be a finite number >= 0, got {value!r}")
        if name in _BELOW_ONE and not 0 <= value < 1:
            raise InputError(f"{key} must be in [0, 1), got {value!r}")
        if name == "betas" and not all(0 <= beta < 1 for beta in value):
            raise InputError(f"{key} must be in [0, 1), got {value!r}")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise InputError(f"{key} must be one of {', '.join(map(repr, _CHOICES[name]))}, got {value!r}")
        if name == "tangent_iterations" and (not isinstance(value, int) or value < 1):
            raise InputError(f"{key} must be an integer >= 1, got {value!r}")


def warn_of_another_scale(optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any], lr_scale: str) -> None:
    """Logs one line per process for each learning rate that is 30 times off the optimizer's default or more.

    A warning and no refusal, because only a run shows which rate is right.

    Args:
        optimizer: the class, whose signature has the defaults.
        options: the options of its param groups.
        lr_scale: what `lr` measures.
    """
    scales = {"lr": lr_scale, "adamw_lr": "the change of an entry in one step of parameters without adapter"}
    # Without the division by norms, the rate scales with the loss and has no usual value.
    if not options.get("simulate_adam", True):
        del scales["lr"]
    parameters = inspect.signature(optimizer).parameters
    for key, scale in scales.items():
        rate = options.get(key)
        # Zero switches training off on purpose.
        if rate and not isinstance(rate, Tensor):
            _warn_if_far(optimizer.__name__, key, float(rate), parameters[key].default, scale)


@functools.cache
def _warn_if_far(name: str, key: str, rate: float, usual: float, scale: str) -> None:
    if not usual / _FAR < rate < usual * _FAR:
        logger.warning(
            "%s=%g is at least %g times off the %g of %s, where it is %s", key, rate, _FAR, usual, name, scale
        )
