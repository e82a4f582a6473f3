"""The learning rate whose first step changes the model's answers by a set amount, found by a few forward passes.

The best rate does not depend on the number of steps, but on the base, the number of adapted layers and the task. The change
that a step makes to the answers depends on all of them at once: see `recipes/results`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor

from qriemann.device import LOSS_SCALE
from qriemann.distributed import process_count, sum_over_processes
from qriemann.errors import InputError
from qriemann.optim.adapter import ON_ADAPTER

#: Mean KL a trained token, in nats, that the first step makes at the measured rate.
CHANGE = 0.1
# Of the secant of the logarithms.
_TRIES = 6
_CLOSE = 0.05
# Far beyond the wanted change the answers saturate, and far below it bfloat16 rounds them by as much.
_SLOPES = (1.0, 4.0)
_FARTHEST = 100.0


class NoSuchRateError(InputError):
    """The answers change too little, or too much, at every rate that was tried."""


def measure_rate(
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    log_probabilities: Callable[[Any], Tensor],
    *,
    change: float = CHANGE,
) -> tuple[float, list[tuple[float, float]]]:
    """Finds the rate at which one step along the gradient of the batches changes the answers on them by `change`.

    The change is the mean KL from the answers before the step to those after it. It grows about as the square of the rate.
    Parameters, gradients and state of the optimizer are left as they were.

    Args:
        optimizer: before its first step; its rate is where the search begins.
        batches: of this process; gradients and changes are summed over all of them.
        loss: of a batch, with a gradient.
        log_probabilities: of a batch, (tokens, vocabulary).
        change: in nats a token.

    Returns:
        The rate, to three digits, and the pairs of a rate and its change that were tried.

    Raises:
        NoSuchRateError: no rate that was tried makes such a change, or half or twice of it.

    Cost: one pass forward and backward, and at most seven more forward, over the batches.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # In host memory, because a training that just fits a card has no room for a second adapter.
    state = send_to_device(copy.deepcopy(optimizer.state_dict()), "cpu")
    values = [p.detach().cpu() if p.device.type != "cpu" else p.detach().clone() for p in parameters]
    gradients = [p.grad for p in parameters]
    # What is trained beside the adapter has a rate of its own, and stands still here.
    moved = [id(group) for group in adapter_groups(optimizer)]
    rates = [group["lr"] if id(group) in moved else 0.0 for group in optimizer.param_groups]
    first = adapter_groups(optimizer)[0]["lr"]
    optimizer.zero_grad()
    try:
        before = []
        for batch in batches:
            (loss(batch) * LOSS_SCALE).backward()
            with torch.no_grad():
                before.append(log_probabilities(batch).cpu())
        for parameter in parameters:
            if parameter.grad is not None:
                sum_over_processes(parameter.grad.div_(LOSS_SCALE * len(batches) * process_count()))

        def restore() -> None:
            with torch.no_grad():
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(value)
            optimizer.load_state_dict(copy.deepcopy(state))

        @torch.no_grad()
        def changed(rate: float) -> float:
            for group, own in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = own * rate / first
            try:
                optimizer.step()
                totals = torch.zeros(2, dtype=torch.float64)
                for batch, old in zip(batches, before, strict=True):
                    new = log_probabilities(batch).cpu()
                    totals += torch.tensor([F.kl_div(new, old, reduction="sum", log_target=True).item(), len(old)])
            finally:
                restore()
            total, tokens = sum_over_processes(totals.to(parameters[0].device)).tolist()
            return total / tokens

        return _search(changed, first, change)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def adapter_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The param groups whose rate is measured: those of the adapter, or all where the optimizer treats all alike."""
    return [group for group in optimizer.param_groups if group.get(ON_ADAPTER)] or optimizer.param_groups


def _search(changed: Callable[[float], float], first: float, change: float) -> tuple[float, list[tuple[float, float]]]:
    """The secant of log(change) over log(rate), from slope 2."""
    tried: list[tuple[float, float]] = []
    rate, slope = first, 2.0
    for _ in range(_TRIES):
        # Rounding alone makes a change of zero, or less.
        tried.append((rate, max(changed(rate), 1e-12)))
        if len(tried) > 1:
            (x, fx), (y, fy) = tried[-2:]
            slope = min(max(math.log(fy / fx) / math.log(y / x), _SLOPES[0]), _SLOPES[1])
        factor = min(max((change / tried[-1][1]) ** (1 / slope), 1 / _FARTHEST), _FARTHEST)
        rate = min(max(rate * factor, first / _FARTHEST**2), first * _FARTHEST**2)
        if abs(math.log(factor)) < _CLOSE or rate == tried[-1][0]:
            break
    made = min((made for _, made in tried), key=lambda made: abs(math.log(made / change)))
    if not change / 2 < made < change * 2:
        raise NoSuchRateError(
            f"no learning rate from {min(tried)[0]:.2g} to {max(tried)[0]:.2g} changes the answers by {change:g} nats a token"
        )
    return float(f"{rate:.3g}"), tried
