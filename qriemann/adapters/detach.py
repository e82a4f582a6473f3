"""Layers on the manifold as plain LoRA layers again: for good (`detach`), or while PEFT computes with the factors itself.

PEFT's own methods find U and V^T in `lora_B.weight` and `lora_A.weight`, and know neither the core nor the offset. Those that
go through `get_delta_weight`, the layer's `merge` and `unmerge` or a state dict are right as they are. The few that read or
write the factors themselves get plain ones.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qriemann.adapters.layer import FixedRankVariant, lora_factors
from qriemann.adapters.saved_rank import forget_own_rank
from qriemann.upstream import replace_peft_functions


def detach(model: nn.Module) -> nn.Module:
    """Turns every layer on the manifold into a plain LoRA layer, in place; any code may use its factors then.

    The model's function and its saved adapter stay as they are. A layer with an offset becomes one of rank 2 r, which is
    what its adapter is saved with; call `truncate_` first for rank r. The factors are new parameters: an optimizer that was
    made before steps on nothing.

    Args:
        model: one that `attach` or a method on the manifold has changed; any other is left as it is.

    Returns:
        The model.
    """
    with _plain_factors(model, keep=True):
        return model


def show_peft_plain_factors() -> None:
    """Makes PEFT's functions that use factors see plain ones in attached layers; calling it again does nothing."""
    replace_peft_functions(
        {
            "tuners.lora.model:LoraModel.add_weighted_adapter": _on_plain_factors,
            "utils.hotswap:hotswap_adapter_from_state_dict": functools.partial(_on_plain_factors, keep=True),
            "utils.hotswap:prepare_model_for_compiled_hotswap": functools.partial(_on_plain_factors, keep=True),
        }
    )


def _on_plain_factors(function: Callable[..., Any], *, keep: bool = False) -> Callable[..., Any]:
    """The function, whose first argument is a model, called while the attached layers of that model are plain.

    Args:
        keep: leave them so, as what the function writes is no point. Only the adapter that it names is concerned.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options).arguments
        adapter = bound.get("adapter_name") if keep else None
        with _plain_factors(next(iter(bound.values())), adapter, keep=keep):
            return function(*args, **options)

    return called


@contextmanager
def _plain_factors(model: nn.Module, adapter: str | None = None, *, keep: bool = False) -> Iterator[None]:
    """Within the block, the attached layers are plain LoRA layers; afterwards too if `keep`, unless it raises."""
    with ExitStack() as to_undo:
        found = [
            (module, name)
            for module in model.modules()
            for name, variant in getattr(module, "lora_variant", {}).items()
            if isinstance(variant, FixedRankVariant) and adapter in (None, name)
        ]
        for module, name in found:
            to_undo.callback(_make_plain(module, name))
        yield
        if keep:
            to_undo.pop_all()
            for module, _ in found:
                _forget_manifold(module)
            forget_own_rank(model, {name for _, name in found})


@torch.no_grad()
def _make_plain(module: Any, adapter: str) -> Callable[[], None]:
    """Replaces the adapter of a layer by plain factors of the rank that is saved; returns what undoes it."""
    variant = module.lora_variant.pop(adapter)
    before = {name: getattr(module, name)[adapter] for name in ("lora_A", "lora_B", "r", "lora_alpha", "scaling")}
    b, a = lora_factors(variant.point)
    bias = before["lora_B"].bias
    module.r[adapter] = a.shape[0]
    if variant.point.offset is not None:
        module.lora_alpha[adapter] *= 2
        if module.use_rslora[adapter]:
            # As in a saved adapter: alpha / sqrt(r) grows by sqrt(2) with both doubled.
            b, bias = b / math.sqrt(2), None if bias is None else bias / math.sqrt(2)
            module.scaling[adapter] *= math.sqrt(2)
    module.lora_A[adapter] = _linear(a, None, before["lora_A"])
    module.lora_B[adapter] = _linear(b, bias, before["lora_B"])

    def undo() -> None:
        for name, value in before.items():
            getattr(module, name)[adapter] = value
        module.lora_variant[adapter] = variant

    return undo


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").train(like.training)
    trained = like.weight.requires_grad
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), trained)
    return layer


def _forget_manifold(module: Any) -> None:
    """Takes off the layer what `attach` put there, once it has no adapter on the manifold any more."""
    if any(isinstance(variant, FixedRankVariant) for variant in module.lora_variant.values()):
        return
    for replaced in ("get_delta_weight", "_cast_input_dtype"):
        vars(module).pop(replaced, None)
    # The hooks stay, and do nothing without it.
    module._fixed_rank_loaded = None
