"""Scaled GD and scaled AdamW: gradient steps on LoRA factors, preconditioned by the other factor's Gram matrix.

[ZP24] Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", ICML 2024, arXiv 2402.02347.

A and B are replaced by A - lr (B^T B + d I)^-1 grad_A and B - lr grad_B (A A^T + d I)^-1: the gradient in the metric
<X_1, X_2> of the product X = B A, so that for d = 0 the step of X does not depend on how X was factored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim.sgd import sgd

from qriemann.errors import InputError
from qriemann.optim.batch import full_float32
from qriemann.optim.factors import (
    ADAMW_OPTIONS,
    ON_FACTORS,
    FactorOptimizer,
    NamedParameter,
    factor_pairs,
    fused_adamw,
    split_factors,
)

DampingForm = Literal["absolute", "relative"]

# Rounding of a float32 Gram matrix of up to 1e5 rows, relative to its trace: what it takes to make one definite that lost it.
_GRAM_ROUNDING = 1e-6


@dataclass
class _Stack:
    """Every A, or every B, of one shape and param group, as one tensor.

    Attributes:
        side: "A" or "B".
        group: index of the param group.
        parameters: k of them, in the order of the rows; their data are views of the rows.
        data: the factors.
        state: tensors of the same shape, by their name in the optimizer's state.
        gradient, direction: room for the gradients and what they become; None where it is allocated in each step.
    """

    side: str
    group: int
    parameters: list[nn.Parameter]
    data: Float[Tensor, "k p q"]
    state: dict[str, Float[Tensor, "k p q"]]
    gradient: Float[Tensor, "k p q"] | None = None
    direction: Float[Tensor, "k p q"] | None = None

    def gram(self, damping: float, form: DampingForm) -> Float[Tensor, "k r r"]:
        """A A^T + d I, or B^T B + d I."""
        gram = self.data @ self.data.mT if self.side == "A" else self.data.mT @ self.data
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        if form == "relative":
            # A factor that is zero has no scale; its partner's gradient is zero too.
            mean = diagonal.mean(-1, keepdim=True)
            diagonal += damping * torch.where(mean > 0, mean, 1)
        else:
            diagonal += damping
        return gram

    def precondition(self, inverse: Float[Tensor, "k r r"]) -> Float[Tensor, "k p q"]:
        """The gradients times the inverse of the partner's Gram matrix; zero for a factor without gradient."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        stacked = torch.stack(grads, out=self.gradient)
        left, right = (inverse, stacked) if self.side == "A" else (stacked, inverse)
        return torch.bmm(left, right, out=self.direction)


@dataclass
class _Batch:
    """All pairs of one rank on one device: Gram matrices stack by stack, one Cholesky factorization of all.

    Attributes:
        stacks: in the order of which the rows of all stacks are numbered.
        partner: number of the row that holds the other factor of the pair.
        partner_index: the same on the device.
    """

    stacks: list[_Stack]
    partner: list[int]
    partner_index: Tensor

    def with_gradient(self) -> list[bool]:
        """Of each row, whether its pair has gradients."""
        present = [p.grad is not None for stack in self.stacks for p in stack.parameters]
        return [present[row] and present[other] for row, other in enumerate(self.partner)]

    def directions(self, groups: list[dict[str, Any]]) -> tuple[list[Tensor], list[bool] | None]:
        """The preconditioned gradients of each stack, and which rows' pairs are finite; None if all are.

        Reads one flag on the host, and the rows' flags only where something is not finite.
        """
        options = [groups[stack.group] for stack in self.stacks]
        with full_float32():
            grams = torch.cat(
                [s.gram(o["damping"], o["damping_form"]) for s, o in zip(self.stacks, options, strict=True)]
            )
            # The r x r matrices are few enough for float64 (1 ms of 20 for 420 of them), which leaves the rounding of the
            # Gram matrices as the only one that their condition number enlarges.
            damped = grams.double()
            factor, failed = torch.linalg.cholesky_ex(damped)
            directions, finite = self._apply(factor, failed != 0)
            if bool(finite.all()):
                return directions, None
            lift = _GRAM_ROUNDING * damped.diagonal(dim1=-2, dim2=-1).sum(-1)
            lift = torch.where(lift > 0, lift, 1).where(failed != 0, 0)
            factor, failed = torch.linalg.cholesky_ex(damped + lift[:, None, None] * _identity(damped))
            directions, finite = self._apply(factor, failed != 0)
        return directions, finite.tolist()

    def _apply(
        self, factor: Float[Tensor, "rows r r"], failed: Bool[Tensor, " rows"]
    ) -> tuple[list[Tensor], Bool[Tensor, " rows"]]:
        # A triangular solve on the tall gradients takes five times as long as this and a product (25 ms against 5).
        inverse = torch.cholesky_solve(_identity(factor).expand_as(factor), factor).to(torch.float32)
        inverse = inverse.masked_fill(failed[:, None, None], torch.nan)[self.partner_index]
        sizes = [len(stack.parameters) for stack in self.stacks]
        directions = [s.precondition(i) for s, i in zip(self.stacks, inverse.split(sizes), strict=True)]
        finite = torch.cat([direction.flatten(1).sum(1) for direction in directions]).isfinite()
        return directions, finite & finite[self.partner_index]


class _Scaled(FactorOptimizer):
    """Preconditions all pairs at once and lets a subclass step along the result.

    The factors become views of a few large tensors, on which the elementwise part of the step runs at once too.
    """

    def __init__(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        #: Updates of single pairs that were not taken because their gradient was not finite.
        self.skipped_updates = 0
        self._bind()

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raises InputError for an option out of range."""
        super().check_options(options)
        if options["damping_form"] not in get_args(DampingForm):
            raise InputError(f"damping_form must be 'absolute' or 'relative', got {options['damping_form']!r}")

    def buffers(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state that has a factor's shape."""
        raise NotImplementedError

    def move(
        self, group: dict[str, Any], parameters: list[Tensor], directions: list[Tensor], state: list[dict[str, Tensor]]
    ) -> None:
        """Steps along the preconditioned gradients; every tensor is one factor or a stack of them.

        Args:
            state: of each tensor, by name; "step" counts the steps before this one.
        """
        raise NotImplementedError

    def _factors(self) -> list[NamedParameter]:
        names = {id(parameter) for group in self.param_groups if group[ON_FACTORS] for parameter in group["params"]}
        return [(name, parameter) for name, parameter in self.adapter_parameters() if id(parameter) in names]

    def _bind(self) -> None:
        """Gathers factors and their state into stacks, and makes the parameters and the state views of them."""
        group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        by_batch: dict[Any, list[tuple[nn.Parameter, nn.Parameter]]] = defaultdict(list)
        for a, b in factor_pairs(self._factors()):
            by_batch[a.device, a.shape[0]].append((a, b))
        self._batches = []
        for pairs in by_batch.values():
            by_stack: dict[Any, list[tuple[int, nn.Parameter]]] = defaultdict(list)
            for number, pair in enumerate(pairs):
                for side, parameter in zip("AB", pair, strict=True):
                    by_stack[side, group_of[id(parameter)], parameter.shape].append((number, parameter))
            stacks = [
                self._stack(side, group, [parameter for _, parameter in members])
                for (side, group, _), members in by_stack.items()
            ]
            _share_gradient_room(stacks)
            rows = [(number, key[0]) for key, members in by_stack.items() for number, _ in members]
            row_of = {pair_and_side: row for row, pair_and_side in enumerate(rows)}
            partner = [row_of[number, "B" if side == "A" else "A"] for number, side in rows]
            self._batches.append(_Batch(stacks, partner, torch.tensor(partner, device=stacks[0].data.device)))
        self._addresses = self._current_addresses()

    def _stack(self, side: str, group: int, parameters: list[nn.Parameter]) -> _Stack:
        data = torch.stack([parameter.data for parameter in parameters])
        states = [self.state[parameter] for parameter in parameters]
        state = {
            key: torch.stack([s[key].to(data.device) if key in s else torch.zeros_like(data[0]) for s in states])
            for key in self.buffers(self.param_groups[group])
        }
        for index, (parameter, entry) in enumerate(zip(parameters, states, strict=True)):
            parameter.data = data[index]
            entry |= {key: rows[index] for key, rows in state.items()}
            # Not a tensor: which factors have made the same number of steps must be known on the host.
            entry["step"] = int(entry.get("step", 0))
        # On the CPU fresh pages cost more than the arithmetic; CUDA's allocator caches, so there the room is transient.
        return _Stack(side, group, parameters, data, state, direction=_room(data))

    def _current_addresses(self) -> list[int]:
        return [p.data_ptr() for batch in self._batches for stack in batch.stacks for p in stack.parameters]

    def step_factors(self) -> None:
        # Parameters that were moved or replaced since are no longer views of the stacks.
        if self._current_addresses() != self._addresses:
            self._bind()
        for batch in self._batches:
            active = batch.with_gradient()
            if not any(active):
                continue
            directions, finite = batch.directions(self.param_groups)
            if finite is not None:
                self.skipped_updates += sum(a and not f for a, f in zip(active, finite, strict=True)) // 2
                active = [a and f for a, f in zip(active, finite, strict=True)]
            start = 0
            for stack, direction in zip(batch.stacks, directions, strict=True):
                end = start + len(stack.parameters)
                self._move_rows(stack, direction, [row for row, a in enumerate(active[start:end]) if a])
                start = end

    def _move_rows(self, stack: _Stack, direction: Float[Tensor, "k p q"], rows: list[int]) -> None:
        if not rows:
            return
        entries = [self.state[stack.parameters[row]] for row in rows]
        parts: list[Any] = list(rows)
        steps = [entry["step"] for entry in entries]
        if len(rows) == len(stack.parameters) and len(set(steps)) == 1:
            parts, steps = [slice(None)], steps[:1]
        state = [
            {
                "step": torch.full((), step, dtype=torch.float32, device=direction.device),
                **{key: buffer[part] for key, buffer in stack.state.items()},
            }
            for part, step in zip(parts, steps, strict=True)
        ]
        group = self.param_groups[stack.group]
        self.move(group, [stack.data[part] for part in parts], [direction[part] for part in parts], state)
        for entry in entries:
            entry["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores options and state, and moves the adapter to the saved one."""
        super().load_state_dict(state_dict)
        self._bind()


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
    _renamed = ADAMW_OPTIONS
    state_keys = frozenset({"step", "momentum", "exp_avg", "exp_avg_sq"})

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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "damping_form": damping_form,
            "adamw_lr": adamw_lr,
            "betas": adamw_betas,
            "eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        super().__init__(params, defaults)

    def split(self, group: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        merged = {**defaults, **group}
        rates = {"lr": merged["adamw_lr"], "weight_decay": merged["adamw_weight_decay"]}
        return split_factors(group, others=rates)

    def buffers(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum",) if group["momentum"] else ()

    def move(
        self, group: dict[str, Any], parameters: list[Tensor], directions: list[Tensor], state: list[dict[str, Tensor]]
    ) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        sgd(
            parameters,
            directions,
            [entry.get("momentum") for entry in state],
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
    state_keys = frozenset({"step", "exp_avg", "exp_avg_sq"})

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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "damping": damping,
            "damping_form": damping_form,
        }
        super().__init__(params, defaults)

    def split(self, group: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        return split_factors(group, others={})

    def buffers(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def move(
        self, group: dict[str, Any], parameters: list[Tensor], directions: list[Tensor], state: list[dict[str, Tensor]]
    ) -> None:
        moments = ([entry[key] for entry in state] for key in ("exp_avg", "exp_avg_sq", "step"))
        fused_adamw(group, parameters, directions, *moments)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _room(like: Tensor) -> Tensor | None:
    return torch.empty_like(like) if like.device.type == "cpu" else None


def _share_gradient_room(stacks: list[_Stack]) -> None:
    """One room for the gathered gradients of all stacks, which are needed one after the other."""
    largest = max(stacks, key=lambda stack: stack.data.numel())
    room = _room(largest.data)
    for stack in stacks:
        if room is not None:
            stack.gradient = room.flatten()[: stack.data.numel()].view(stack.data.shape)
