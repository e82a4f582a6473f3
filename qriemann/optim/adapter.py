"""What all optimizers of adapters share: checked options, AdamW for everything else, a state that holds the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from qriemann.errors import InputError
from qriemann.optim.options import check_options, warn_of_another_scale

#: Marks the param groups that hold nothing but an adapter's factors; AdamW trains the others.
ON_ADAPTER = "on_adapter"
# Entries of a parameter's state that have its shape.
_SHAPED = ("factor", "momentum", "momentum_buffer", "exp_avg", "exp_avg_sq")


class AdapterOptimizer(torch.optim.Optimizer):
    """Moves an adapter by a step of its own, and everything else by torch's fused AdamW.

    The state_dict also holds the adapter in float32: a trainer that resumes casts the saved adapter to its own dtype before
    it creates the optimizer, and loading the state brings the lost bits back.

    Args:
        params: a model, or parameters or param groups of one.
        defaults: the options of a param group; `adamw_lr`, `adamw_betas`, `adamw_eps` and `adamw_weight_decay` are those of
            the parameters outside the adapter.

    Attributes:
        lr_scale: what `lr` measures.
        takes_closure: whether `step` may evaluate the loss.
    """

    lr_scale: ClassVar[str]
    takes_closure: ClassVar[bool] = True
    capturable = False

    def __init__(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]) -> None:
        check_options(defaults)
        warn_of_another_scale(type(self), defaults, self.lr_scale)
        # torch adds keys of its own to `self.defaults` later.
        self._saved_keys = {*defaults, ON_ADAPTER}
        super().__init__(self.make_groups(params, defaults), defaults)
        self._made = True

    def make_groups(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """Checked param groups, each marked by ON_ADAPTER, from what the user passed."""
        raise NotImplementedError

    def step_adapter(self) -> None:
        """Moves the param groups marked ON_ADAPTER."""
        raise NotImplementedError

    def saved_adapter(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """What `state_dict` holds of the adapter, parameter by parameter."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch while the optimizer is made; InputError later, because the tensors are gathered then."""
        if getattr(self, "_made", False):
            raise InputError(
                f"param groups must be given when {type(self).__name__} is made, got one later; make a new optimizer"
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            if not self.takes_closure:
                raise InputError(
                    f"closure must be None: {type(self).__name__} evaluates no loss; call backward() before step()"
                )
            with torch.enable_grad():
                loss = closure()
        self.step_adapter()
        for group in self.param_groups:
            if not group[ON_ADAPTER]:
                parameters = [p for p in group["params"] if p.grad is not None]
                self.adamw_step(group, parameters, [p.grad for p in parameters])
        return loss

    def adamw_step(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Any]) -> None:
        """torch's fused AdamW on `parameters`, with the rates of `group` and the state kept here."""
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            elif state["step"].device != parameter.device:
                # A trainer loads the state to the CPU; torch moves all of it to the parameter except the step.
                state["step"] = state["step"].to(parameter.device)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            capturable=self.capturable,
        )

    def state_dict(self) -> dict[str, Any]:
        """As in torch, and the adapter in the entries of its parameters."""
        saved = list(self.saved_adapter())
        packed = super().state_dict()
        index_of = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        entries = {i: dict(entry) for i, entry in packed["state"].items()}
        for parameter, tensors in saved:
            entries.setdefault(index_of[id(parameter)], {}).update(tensors)
        # Copies, because live tensors may be views: torch.save would write the whole buffer once for each.
        packed["state"] = {
            i: {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
            for i, entry in entries.items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores options and state; subclasses move the adapter to the saved one.

        Raises:
            InputError: the state of another method.
            ValueError: the state of parameters of other shapes.
        """
        missing = self._saved_keys.difference(*(group.keys() for group in state_dict["param_groups"]))
        if missing:
            raise InputError(
                f"optimizer state must be that of {type(self).__name__}, got one without {', '.join(sorted(missing))}; "
                "resume with the method that saved it"
            )
        super().load_state_dict(state_dict)
        # A kernel of the first step would notice, or worse, broadcast.
        for parameter, entry in self.state.items():
            for key in _SHAPED:
                # A point keeps the momentum of its V upright, and V itself transposed.
                if key in entry and sorted(entry[key].shape) != sorted(parameter.shape):
                    raise ValueError(
                        f"optimizer state must fit the parameters, got {key} of shape {tuple(entry[key].shape)} for one of "
                        f"shape {tuple(parameter.shape)}"
                    )


def adapter_and_rest(
    members: list[Any], on_adapter: list[bool], options: dict[str, Any], defaults: dict[str, Any]
) -> list[dict[str, Any]]:
    """A param group of the members on the adapter, and one of the others, which takes its rates from the adamw_ options.

    A group given without any factor may also name its rates plainly, such as lr.
    """
    factors = [member for member, chosen in zip(members, on_adapter, strict=True) if chosen]
    others = [member for member, chosen in zip(members, on_adapter, strict=True) if not chosen]
    merged = {**defaults, **options}
    rates = {
        key: options[key] if key in options and not factors else merged[f"adamw_{key}"]
        for key in ("lr", "betas", "eps", "weight_decay")
        if f"adamw_{key}" in merged
    }
    groups = [
        {**options, "params": factors, ON_ADAPTER: True},
        {**options, **rates, "params": others, ON_ADAPTER: False},
    ]
    return [group for group in groups if group["params"]]
