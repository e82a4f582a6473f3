"""Layers on the manifold as plain LoRA layers again.

PEFT's own methods find U and V^T in `lora_B.weight` and `lora_A.weight`, and know neither the core nor the offset. Those that
go through `get_delta_weight`, the layer's `merge` and `unmerge` or a state dict are right as they are. The few that use the
factors themselves are refused.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qriemann.adapters.layer import FixedRankVariant, lora_factors
from qriemann.adapters.saved_rank import forget_own_rank
from qriemann.errors import InputError
from qriemann.upstream.tuners import replace_peft_functions


def detach(model: nn.Module) -> nn.Module:
    """Turns every layer on the manifold into a plain LoRA layer, in place; any code may use its factors then.

    The model's function and its saved adapter stay as they are. A layer with an offset becomes one of rank 2 r, which is
    what its adapter is saved with; call `truncate_` first for rank r. The factors are new parameters: an optimizer that was
    made before steps on nothing.

    Args:
        model: one that `attach` or a method on the manifold has changed; any other is left as it is.
    """
    attached = _attached(model)
    for module, adapter in attached:
        _make_plain(module, adapter)
    forget_own_rank(model, {adapter for _, adapter in attached})
    return model


def refuse_other_use_of_factors() -> None:
    """Makes PEFT's functions that use the factors themselves refuse attached layers; calling it again does nothing."""
    replace_peft_functions(_refusing)


def _refusing(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, whose first argument is a model, but for models with attached layers."""

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        if _attached(args[0] if args else options["model"]):
            raise InputError(
                f"{name} knows plain factors alone, and these layers are on the manifold; call qriemann.detach(model) first"
            )
        return function(*args, **options)

    return called


def _attached(model: nn.Module) -> list[tuple[Any, str]]:
    """The layers on the manifold, each with the adapter that is."""
    return [
        (module, adapter)
        for module in model.modules()
        for adapter, variant in getattr(module, "lora_variant", {}).items()
        if isinstance(variant, FixedRankVariant)
    ]


@torch.no_grad()
def _make_plain(module: Any, adapter: str) -> None:
    """Replaces the adapter of a layer by plain factors of the rank that is saved."""
    point = module.lora_variant.pop(adapter).point
    b, a = lora_factors(point)
    bias = module.lora_B[adapter].bias
    module.r[adapter] = a.shape[0]
    if point.offset is not None:
        module.lora_alpha[adapter] *= 2
        if module.use_rslora[adapter]:
            # As in a saved adapter: alpha / sqrt(r) grows by sqrt(2) with both doubled.
            b, bias = b / math.sqrt(2), None if bias is None else bias / math.sqrt(2)
            module.scaling[adapter] *= math.sqrt(2)
    module.lora_A[adapter] = _linear(a, None, module.lora_A[adapter])
    module.lora_B[adapter] = _linear(b, bias, module.lora_B[adapter])
    if not _attached(module):
        # What `attach` put there. Its hooks stay, and do nothing without the last.
        for replaced in ("get_delta_weight", "_cast_input_dtype"):
            vars(module).pop(replaced, None)
        module._fixed_rank_loaded = None


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").train(like.training)
    trained = like.weight.requires_grad
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), trained)
    return layer
