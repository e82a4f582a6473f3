"""Scaled GD and scaled AdamW: gradient steps on LoRA factors, preconditioned by the other factor's Gram matrix.

[ZP24] Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", ICML 2024, arXiv 2402.02347.

A and B are replaced by A - lr (B^T B + d I)^-1 grad_A and B - lr grad_B (A A^T + d I)^-1: the gradient in the metric
<X_1, X_2> of the product X = B A, so that for d = 0 the step of X does not depend on how X was factored.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim.sgd import sgd

from qriemann.optim.adapter import ON_ADAPTER
from qriemann.optim.batch import Workspace, full_float32
from qriemann.optim.factors import FactorOptimizer, factor_pairs
from qriemann.optim.options import DampingForm, options_of

# Rounding of a float32 Gram matrix of up to 1e5 rows, relative to its trace: what it takes to make one definite that lost it.
_GRAM_ROUNDING = 1e-6


@dataclass
class _Stack:
    """Every A, or every B, of one shape and param group, to be computed on as one tensor.

    Attributes:
        side: "A" or "B".
        group: the param group.
        parameters: k of them.
        pairs: the number of each one's pair.
        room: for what the step computes.
    """

    side: str
    group: dict[str, Any]
    room: Workspace
    parameters: list[Tensor] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)

    def _gather(self, tensors: list[Tensor]) -> Float[Tensor, "k p q"]:
        # One room for all stacks, which are needed one after the other.
        shape = (len(tensors), *tensors[0].shape)
        return torch.stack(tensors, out=self.room.take("gathered", shape, tensors[0].device))

    def gram(self) -> Float[Tensor, "k r r"]:
        """A A^T + d I, or B^T B + d I."""
        factors = self._gather([parameter.data for parameter in self.parameters])
        gram = factors @ factors.mT if self.side == "A" else factors.mT @ factors
        diagonal, damping = gram.diagonal(dim1=-2, dim2=-1), self.group["damping"]
        if self.group["damping_form"] == "relative":
            # A factor that is zero has no scale; its partner's gradient is zero too.
            mean = diagonal.mean(-1, keepdim=True)
            damping = damping * torch.where(mean > 0, mean, 1)
        diagonal += damping
        return gram

    def precondition(self, inverse: Float[Tensor, "k r r"]) -> Float[Tensor, "k p q"]:
        """The gradients times the inverse of the partner's Gram matrix."""
        grads = self._gather([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        left, right = (inverse, grads) if self.side == "A" else (grads, inverse)
        use = self.side, self.pairs[0], grads.shape
        return torch.bmm(left, right, out=self.room.take(use, grads.shape, grads.device))


# Kept, because a copy from the host would wait for the device at every step.
@functools.lru_cache(maxsize=8)
def _partners(rows: tuple[tuple[int, str], ...], device: torch.device) -> Tensor:
    """The row of each row's partner."""
    row_of = {pair_and_side: row for row, pair_and_side in enumerate(rows)}
    return torch.tensor([row_of[pair, "B" if side == "A" else "A"] for pair, side in rows]).to(device)


def _directions(stacks: list[_Stack]) -> tuple[list[Tensor], list[bool] | None]:
    """The preconditioned gradients of each stack, and whether each row's pair is finite; None where all are.

    All stacks hold pairs of one rank on one device, so one Cholesky factorization serves them all. Reads one flag on the
    host, and the rows' flags only where something is not finite.
    """
    partner = _partners(
        tuple((pair, stack.side) for stack in stacks for pair in stack.pairs), stacks[0].parameters[0].device
    )

    def apply(factor: Float[Tensor, "rows r r"], failed: Bool[Tensor, " rows"]) -> tuple[list[Tensor], Tensor]:
        # A triangular solve on the tall gradients takes five times as long as this and a product (25 ms against 5).
        inverse = torch.cholesky_solve(identity.expand_as(factor), factor).to(torch.float32)
        inverse = inverse.masked_fill(failed[:, None, None], torch.nan)[partner]
        parts = inverse.split([len(stack.parameters) for stack in stacks])
        directions = [stack.precondition(part) for stack, part in zip(stacks, parts, strict=True)]
        finite = torch.cat([direction.flatten(1).sum(1) for direction in directions]).isfinite()
        return directions, finite & finite[partner]

    with full_float32():
        # The r x r matrices are few enough for float64 (1 ms of 20 for 420 of them), which leaves the rounding of the Gram
        # matrices as the only one that their condition number enlarges.
        damped = torch.cat([stack.gram() for stack in stacks]).double()
        identity = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        directions, finite = apply(factor, failed != 0)
        if bool(finite.all()):
            return directions, None
        lift = _GRAM_ROUNDING * damped.diagonal(dim1=-2, dim2=-1).sum(-1)
        lift = torch.where(lift > 0, lift, 1).where(failed != 0, 0)
        factor, failed = torch.linalg.cholesky_ex(damped + lift[:, None, None] * identity)
        directions, finite = apply(factor, failed != 0)
    return directions, finite.tolist()


class _Scaled(FactorOptimizer):
    """Preconditions all pairs at once and lets a subclass step along the result."""

    def __init__(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        #: How many updates of single pairs were skipped for a non-finite gradient.
        self.skipped_updates = 0
        self._room = Workspace()
        self._group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        on_adapter = {id(p) for group in self.param_groups if group[ON_ADAPTER] for p in group["params"]}
        self._pairs = factor_pairs((name, p) for name, p in self.adapter_parameters() if id(p) in on_adapter)

    def move(self, group: dict[str, Any], parameters: list[Tensor], directions: list[Tensor]) -> None:
        """Steps along the preconditioned gradients."""
        raise NotImplementedError

    def step_adapter(self) -> None:
        batches: dict[Any, dict[Any, _Stack]] = defaultdict(dict)
        for number, pair in enumerate(self._pairs):
            if any(parameter.grad is None for parameter in pair):
                continue
            stacks = batches[pair[0].device, pair[0].shape[0]]
            for side, parameter in zip("AB", pair, strict=True):
                index = self._group_of[id(parameter)]
                key = side, index, parameter.shape
                stack = stacks.setdefault(key, _Stack(side, self.param_groups[index], self._room))
                stack.parameters.append(parameter)
                stack.pairs.append(number)
        for stacks in batches.values():
            self._step_batch(list(stacks.values()))

    def _step_batch(self, stacks: list[_Stack]) -> None:
        directions, finite = _directions(stacks)
        if finite is not None:
            self.skipped_updates += finite.count(False) // 2
        first = 0
        for stack, direction in zip(stacks, directions, strict=True):
            moved, along = stack.parameters, list(direction.unbind())
            if finite is not None:
                kept = finite[first : first + len(moved)]
                moved, along = list(itertools.compress(moved, kept)), list(itertools.compress(along, kept))
                first += len(kept)
            if moved:
                self.move(stack.group, moved, along)


class ScaledGD(_Scaled):
    """Gradient descent on LoRA factors, preconditioned by r x r Gram matrices; AdamW for everything else. [ZP24]

    Both preconditioners are read before either factor moves, as in the paper and its reference code. Only so is the step of
    X = B A the same for every factorization of X (for damping 0; a damping of d matters where a Gram matrix has eigenvalues
    near d).

    Args:
        params: a PEFT model, or its `named_parameters()` or param groups of such. Factors of a model become float32.
        lr: share of the preconditioned gradient, >= 0. It has the scale of the loss in it, as in SGD.
        momentum: heavy-ball factor of the preconditioned gradients, in [0, 1).
        weight_decay: decoupled decay of the factors, >= 0.
        damping: d above, >= 0.
        damping_form: "absolute" adds d I, as the paper does; "relative" adds d times the mean diagonal entry, which keeps
            its meaning when the adapter is scaled.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: for parameters that are not factors, as in torch.optim.AdamW.

    Raises:
        InputError: a value out of range, a LoRA layer that is not linear, or nothing to train.

    State: one block of a factor's shape each with momentum, none without. A pair whose gradient is not finite keeps
    everything, and is counted in `skipped_updates`. A step reads one flag on the host.
    """

    lr_scale = "the share of a preconditioned gradient, which has the scale of the loss"

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.01,
        *,
        damping: float = 1e-6,
        damping_form: DampingForm = "absolute",
        adamw_lr: float = 1e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, options_of(locals()))

    def move(self, group: dict[str, Any], parameters: list[Tensor], directions: list[Tensor]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        buffers: list[Tensor | None] = [None] * len(parameters)
        if group["momentum"]:
            for parameter in parameters:
                self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            buffers = [self.state[parameter]["momentum"] for parameter in parameters]
        sgd(
            parameters,
            directions,
            buffers,
            has_sparse_grad=False,
            fused=True,
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class ScaledAdamW(_Scaled):
    """AdamW on LoRA factors whose moments see gradients preconditioned by r x r Gram matrices. [ZP24, Algorithm 1]

    Both preconditioners are read before either factor moves. So the paper writes it, and so PEFT's
    `create_riemannian_optimizer` and the reference code of scaled GD do it; the reference code of scaled AdamW reads A A^T
    from the A that it has just moved, because its copy of the old A is an alias. With one reading time, all Gram matrices of
    a rank are factored in one call.

    AdamW divides elementwise, so unlike `ScaledGD` the trajectory of X depends on how X was factored.

    Args:
        params: a PEFT model, or its `named_parameters()` or param groups of such. Factors of a model become float32.
        lr: about the change of a factor's entry in one step, >= 0, as in AdamW.
        betas, eps: as in torch.optim.AdamW.
        weight_decay: decoupled decay of the factors, >= 0.
        damping, damping_form: as in `ScaledGD`.

    Parameters that are not factors are trained by AdamW with the same rates.

    Raises:
        InputError: as `ScaledGD`.

    State: two blocks of a factor's shape each, as AdamW. Pairs with gradients that are not finite: as `ScaledGD`.
    """

    lr_scale = "the change of a factor's entry in one step"

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        damping: float = 1e-6,
        damping_form: DampingForm = "absolute",
    ) -> None:
        super().__init__(params, options_of(locals()))

    def move(self, group: dict[str, Any], parameters: list[Tensor], directions: list[Tensor]) -> None:
        self.adamw_step(group, parameters, directions)
