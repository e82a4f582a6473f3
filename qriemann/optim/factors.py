"""Plain LoRA factors as optimizers see them: found by name, told apart from everything else that is trained.

`lora_A.weight` is A (r, n), `lora_B.weight` is B (m, r), the adapter is X = B A, and `.grad` are the partial derivatives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from qriemann.errors import InputError
from qriemann.optim.rates import warn_of_another_scale

NamedParameter = tuple[str, nn.Parameter]

#: Options of AdamW beside another method, and the names that a step reads them by.
ADAMW_OPTIONS = {"adamw_betas": "betas", "adamw_eps": "eps"}
#: Marks the param groups that hold nothing but factors.
ON_FACTORS = "lora_factors"

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.(?P<adapter>.*)weight")


class GatheringOptimizer(torch.optim.Optimizer):
    """An optimizer that gathers its tensors when it is made, and so takes no param group later."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._made = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch while the optimizer is made; InputError later."""
        if getattr(self, "_made", False):
            raise InputError(
                f"param groups must be given when {type(self).__name__} is made, got one later; make a new optimizer"
            )
        super().add_param_group(param_group)


class FactorOptimizer(GatheringOptimizer):
    """What the optimizers over plain LoRA factors share.

    Args:
        params: a PEFT model, or an iterable of (name, parameter) as `model.named_parameters()` gives them, or of param
            groups of such. A model's factors become float32.
        defaults: the options of a param group.

    Attributes:
        lr_scale: what `lr` is a measure of.
        state_keys: what the state of a parameter may hold.
        needs_pairs: whether both factors of an adapter must be trained, of one adapter at least.

    The state_dict also holds the adapter's float32 parameters: a trainer that resumes loads the saved adapter into the
    dtype that it was cast to, before it creates the optimizer, and the lost bits come back with the state.
    """

    lr_scale: ClassVar[str]
    state_keys: ClassVar[frozenset[str]]
    needs_pairs: ClassVar[bool] = True
    _renamed: ClassVar[dict[str, str]] = {}

    def __init__(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]) -> None:
        self.check_options(defaults)
        warn_of_another_scale(type(self), defaults, self.lr_scale)
        groups = [renamed_options(group, self._renamed) for group in _named_groups(params)]
        for group in groups:
            self.check_options({**defaults, **group})
        split = [part for group in groups for part in self.split(group, defaults)]
        if self.needs_pairs:
            factor_pairs(member for group in groups for member in group["params"])
        if isinstance(params, nn.Module):
            # Not before the checks: a model that is refused stays as it was.
            from qriemann.adapters.plain import prepare_plain

            prepare_plain(params)
        super().__init__(split, defaults)

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raises InputError for an option out of range."""
        for key in (
            "lr",
            "weight_decay",
            "eps",
            "damping",
            "adamw_lr",
            "adamw_eps",
            "adamw_weight_decay",
            "lora_plus_ratio",
        ):
            value = options.get(key, 0.0)
            if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
                raise InputError(f"{key} must be a finite number >= 0, got {value!r}")
        if not 0 <= options.get("momentum", 0.0) < 1:
            raise InputError(f"momentum must be in [0, 1), got {options['momentum']!r}")
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise InputError(f"betas must be in [0, 1), got {options['betas']!r}")

    def split(self, group: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """The param groups that are made of one given by the user."""
        raise NotImplementedError

    def step_factors(self) -> None:
        """Moves the param groups marked ON_FACTORS."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_factors()
        for group in self.param_groups:
            if not group[ON_FACTORS]:
                adamw_step(self, group)
        return loss

    def adapter_parameters(self) -> list[NamedParameter]:
        """Every parameter of a LoRA adapter, with its name."""
        return [
            (name, parameter)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if ".lora_" in name
        ]

    def state_dict(self) -> dict[str, Any]:
        """As in torch; the entry of an adapter's parameter also holds the parameter."""
        packed = super().state_dict()
        index_of = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        # Copies, because live tensors may be views: torch.save would write the whole buffer once for each.
        packed["state"] = {
            i: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
            for i, entry in packed["state"].items()
        }
        for _, parameter in self.adapter_parameters():
            packed["state"].setdefault(index_of[id(parameter)], {})["factor"] = parameter.detach().clone()
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores options and state, and moves the adapter to the saved one."""
        found = {key for entry in state_dict["state"].values() for key in entry}
        if not found <= self.state_keys | {"factor"}:
            raise InputError(
                f"optimizer state must be that of {type(self).__name__}, got one with {', '.join(sorted(found))}; "
                "resume with the method that saved it"
            )
        super().load_state_dict(state_dict)
        for name, parameter in self.adapter_parameters():
            saved = self.state[parameter].pop("factor", None)
            if saved is None:
                raise InputError(f"optimizer state must hold the factors of the adapter, got none of {name}")
            parameter.data.copy_(saved)


def renamed_options(group: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The group with its options under the names that a step reads them by: a constructor's adamw_betas are betas there."""
    return {names.get(key, key): value for key, value in group.items()}


def adamw_step(optimizer: torch.optim.Optimizer, group: dict[str, Any], *, capturable: bool = False) -> None:
    """torch's fused AdamW on the parameters of `group` that have a gradient; `capturable` as in torch.optim.AdamW."""
    parameters = [p for p in group["params"] if p.grad is not None]
    if not parameters:
        return
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        elif state["step"].device != parameter.device:
            # A trainer loads the state to the CPU; torch moves all of it to the parameter but the step.
            state["step"] = state["step"].to(parameter.device)
    states = [optimizer.state[parameter] for parameter in parameters]
    fused_adamw(
        group,
        parameters,
        [parameter.grad for parameter in parameters],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["step"] for state in states],
        capturable=capturable,
    )


def fused_adamw(
    group: dict[str, Any],
    parameters: list[Any],
    grads: list[Any],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    capturable: bool = False,
) -> None:
    """torch's fused AdamW with the rates of `group`; counts the steps up."""
    adamw(
        parameters,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        capturable=capturable,
    )


def split_factors(group: dict[str, Any], *, others: dict[str, Any]) -> list[dict[str, Any]]:
    """A param group of the factors of linear LoRA layers and one of everything else.

    Args:
        group: with named parameters.
        others: options of the second group; they give way to those of a given group that holds no factor.

    Raises:
        InputError: a LoRA layer that is not linear, or a factor without its partner.
    """
    options = {key: value for key, value in group.items() if key != "params"}
    factors = [(name, parameter) for name, parameter in group["params"] if _FACTOR.fullmatch(name)]
    rest = [(name, parameter) for name, parameter in group["params"] if not _FACTOR.fullmatch(name)]
    for name, parameter in group["params"]:
        if ".lora_embedding_" in name or (_FACTOR.fullmatch(name) and parameter.ndim != 2):
            raise InputError(
                f"every LoRA layer must be linear for this method, got {name} of shape {tuple(parameter.shape)}; leave the "
                "layer out of target_modules"
            )
    groups = []
    if factors:
        groups.append({**options, "params": factors, ON_FACTORS: True})
    if rest:
        merged = {**options, **others} if factors else {**others, **options}
        groups.append({**merged, "params": rest, ON_FACTORS: False})
    return groups


def factor_pairs(named: Iterable[NamedParameter]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) of every adapter, in the order of the A.

    Raises:
        InputError: no factor at all, or one without its partner.
    """
    sides: dict[tuple[str, str], dict[str, NamedParameter]] = {}
    for name, parameter in named:
        match = _FACTOR.fullmatch(name)
        if match:
            sides.setdefault((match["layer"], match["adapter"]), {})[match["side"]] = name, parameter
    if not sides:
        raise InputError(
            "params must hold the factors of a LoRA adapter on at least one linear layer, got none; call "
            "peft.get_peft_model(model, LoraConfig(target_modules='all-linear')) first"
        )
    for pair in sides.values():
        if len(pair) == 1:
            (name, _), *_ = pair.values()
            raise InputError(f"both factors of an adapter must be trained, got {name} without its partner; unfreeze it")
    return [(pair["A"][1], pair["B"][1]) for pair in sides.values()]


def _named_groups(params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    """Param groups whose "params" are lists of (name, parameter), checked."""
    if isinstance(params, nn.Module):
        # Imported here: parameters are all that this layer needs otherwise.
        from qriemann.adapters.plain import trainable_parameters

        given: list[Any] = trainable_parameters(params)
    else:
        given = list(params)
    if not given:
        raise InputError("params must hold at least one trainable parameter, got none; does the model have an adapter?")
    groups = [{**group, "params": list(group["params"])} for group in given] if isinstance(given[0], dict) else None
    groups = groups or [{"params": given}]
    for member in (member for group in groups for member in group["params"]):
        if not isinstance(member, tuple):
            raise InputError(
                f"params must come with their names, got a bare {type(member).__name__}; pass the PEFT model or its "
                "named_parameters()"
            )
        name, parameter = member
        if hasattr(parameter, "fixed_rank"):
            raise InputError(
                f"adapters must be plain LoRA for this method, got {name} on the fixed-rank manifold, whose gradients are "
                "tangent blocks; use a method on the manifold, or make a new adapter"
            )
        if ".lora_" in name and parameter.dtype != torch.float32 and not isinstance(params, nn.Module):
            raise InputError(f"factors must be float32, got {name} in {parameter.dtype}; pass the PEFT model itself")
    return groups
