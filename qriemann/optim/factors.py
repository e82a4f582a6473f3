"""Plain LoRA factors as optimizers see them: found by name, told apart from everything else that is trained.

`lora_A.weight` is A (r, n), `lora_B.weight` is B (m, r), the adapter is X = B A, and `.grad` are the partial derivatives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qriemann.errors import InputError
from qriemann.optim.adapter import AdapterOptimizer, adapter_and_rest
from qriemann.optim.options import check_options
from qriemann.upstream import protect_quantized_weights

NamedParameter = tuple[str, nn.Parameter]

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.(?P<adapter>.*)weight")


class FactorOptimizer(AdapterOptimizer):
    """What the optimizers over plain LoRA factors share.

    Args:
        params: a PEFT model, or an iterable of (name, parameter) as `model.named_parameters()` gives them, or of param
            groups of such. A model's factors become float32.
        defaults: the options of a param group.

    Attributes:
        needs_pairs: whether both factors of an adapter must be trained, of one adapter at least.
    """

    needs_pairs: ClassVar[bool] = True

    def make_groups(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        groups = _named_groups(params)
        for group in groups:
            check_options({**defaults, **group})
        split = [part for group in groups for part in self.split(group, defaults)]
        if self.needs_pairs:
            factor_pairs(member for group in groups for member in group["params"])
        if isinstance(params, nn.Module):
            # Not before the checks: a model that is refused stays as it was.
            _prepare(params)
        return split

    def split(self, group: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """A param group of the factors of linear LoRA layers and one of everything else.

        Raises:
            InputError: a LoRA layer that is not linear.
        """
        on_adapter = []
        for name, parameter in group["params"]:
            on_adapter.append(_FACTOR.fullmatch(name) is not None)
            if ".lora_embedding_" in name or (on_adapter[-1] and parameter.ndim != 2):
                raise InputError(
                    f"every LoRA layer must be linear for this method, got {name} of shape {tuple(parameter.shape)}; "
                    "leave the layer out of target_modules"
                )
        options = {key: value for key, value in group.items() if key != "params"}
        return adapter_and_rest(group["params"], on_adapter, options, defaults)

    def adapter_parameters(self) -> list[NamedParameter]:
        """Every parameter of a LoRA adapter, with its name."""
        return [
            (name, parameter)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if ".lora_" in name
        ]

    def saved_adapter(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        return ((parameter, {"factor": parameter}) for _, parameter in self.adapter_parameters())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores options and state, and moves the adapter to the saved one."""
        super().load_state_dict(state_dict)
        for name, parameter in self.adapter_parameters():
            saved = self.state[parameter].pop("factor", None)
            if saved is None:
                raise InputError(f"optimizer state must hold the factors of the adapter, got none of {name}")
            parameter.data.copy_(saved)


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


def _prepare(model: nn.Module) -> None:
    """Makes the trainable parameters of LoRA adapters float32, in place.

    It comes after the last cast of the model: TRL's trainers cast the adapter of a 4-bit model to bf16 in their constructor,
    and in bf16 a step of 1e-4 is lost beside a factor of 1e-2.
    """
    # Imported here: everything else in this folder needs parameters alone.
    from qriemann.adapters.attach import report_low_precision

    protect_quantized_weights(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" in name:
            parameter.data = parameter.data.to(torch.float32)
    report_low_precision(model)


def _named_groups(params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    """Param groups whose "params" are lists of (name, parameter), checked."""
    if isinstance(params, nn.Module):
        for name, module in params.named_modules():
            if getattr(module, "_fixed_rank_loaded", None):
                raise InputError(
                    f"{name} was saved with an offset, which plain LoRA has no place for; resume with the method that "
                    "saved it"
                )
        given: list[Any] = [
            (name, parameter) for name, parameter in params.named_parameters() if parameter.requires_grad
        ]
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
