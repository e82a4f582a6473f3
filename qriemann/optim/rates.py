"""Learning rates on another method's scale: said, not refused, because only a run shows what is right."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# A rate copied from a method on another scale is off by 50 to 500; a rate tuned for a task, by less than 30.
_FAR = 30.0


def warn_of_another_scale(optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any], lr_scale: str) -> None:
    """Logs a line, once in a process, for each learning rate that is 30 times off the optimizer's default or more.

    Args:
        optimizer: the class, whose signature has the defaults.
        options: of its param groups.
        lr_scale: what `lr` is a measure of.
    """
    scales = {"lr": lr_scale, "adamw_lr": "the change of an entry in one step of parameters without adapter"}
    # Without the division by norms the rate has the scale of the loss in it, and no usual value.
    if not options.get("simulate_adam", True):
        del scales["lr"]
    parameters = inspect.signature(optimizer).parameters
    for key, scale in scales.items():
        rate = options.get(key)
        # Zero rests, and a tensor may lie on a device that would have to be waited for.
        if rate and not isinstance(rate, Tensor):
            _warn_if_far(optimizer.__name__, key, float(rate), parameters[key].default, scale)


@functools.cache
def _warn_if_far(name: str, key: str, rate: float, usual: float, scale: str) -> None:
    if not usual / _FAR < rate < usual * _FAR:
        logger.warning(
            "%s=%g is at least %g times off the %g of %s, where it is %s", key, rate, _FAR, usual, name, scale
        )
