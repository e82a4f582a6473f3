"""Which layers get an adapter, checked on the base model before it is built."""

import copy
import re
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from qriemann.adapters.lora_layers import check_rank
from qriemann.base.host_embedding import HostEmbedding
from qriemann.errors import InputError
from qriemann.upstream import name_of
from qriemann.upstream.tuners import get_pattern_key, names_of_experts

_ALL_LINEAR = "all-linear"


def adapter_config(settings: Any, *, offset: bool) -> LoraConfig:
    """PEFT's configuration of an adapter that is saved with rank lora_r; beside an offset it gets half of each rank."""
    parts = 2 if offset else 1
    alpha = settings.lora_r if settings.lora_alpha is None else settings.lora_alpha
    ranks = {"lora_r": settings.lora_r, **(settings.rank_pattern or {})}
    for name, rank in ranks.items():
        # check_targets says what else may be wrong with a rank.
        if offset and isinstance(rank, int) and rank % 2:
            raise InputError(f"{name} must be even with start: offset, which gives the point half of it, got {rank}")
    names = list(settings.lora_target_modules)
    # One word names a layer, as several do; anything else alone is PEFT's: a pattern for the whole path, or all-linear.
    alone = len(names) == 1 and (names[0] == _ALL_LINEAR or not re.fullmatch(r"[\w.]+", names[0]))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r // parts,
        lora_alpha=_divided(alpha, parts),
        lora_dropout=settings.lora_dropout,
        target_modules=names[0] if alone else names or _ALL_LINEAR,
        use_rslora=settings.use_rslora,
        modules_to_save=settings.lora_modules_to_save and list(settings.lora_modules_to_save),
        rank_pattern={key: _divided(rank, parts) for key, rank in (settings.rank_pattern or {}).items()},
        alpha_pattern={key: _divided(value, parts) for key, value in (settings.alpha_pattern or {}).items()},
    )


def _divided(number: Any, parts: int) -> Any:
    """A whole number where it can be; anything but a number as it is, for check_targets to refuse."""
    if isinstance(number, bool) or not isinstance(number, int | float) or parts == 1:
        return number
    return number / parts if number % parts else int(number // parts)


def without_experts(model: Any, config: LoraConfig) -> tuple[LoraConfig, str | None]:
    """The configuration without what no adapter can sit on, and a line about that; itself and None where all is linear.

    Fused experts are parameters of three dimensions. PEFT takes some names of linear layers for them, too, and all-linear
    would match gates of one output, which have no rank.
    """
    linear, experts = _linear_layers(model), names_of_experts(model)
    target = config.target_modules
    if isinstance(target, str):
        asked = _matched(model, target, linear)
        one = {name for name in asked if target == _ALL_LINEAR and 1 in shape_of(linear[name])}
        kept = {name for name in asked if _last(name) not in experts} - one
        wanted = {_last(name) for name in kept} if target == _ALL_LINEAR else kept
    else:
        wanted = {name for name in target or () if _last(name) not in experts}
        asked = {name: linear[name] for word in target or () for name in linear if f".{name}".endswith(f".{word}")}
        kept = {name for name in asked if _last(name) not in experts}
    if experts or len(kept) < len(asked):
        if not wanted:
            _refuse(target, linear, model)
        config = copy.copy(config)
        config.target_modules = wanted
    return config, _describe_left_out(model, sorted(asked.keys() - kept))


def _describe_left_out(model: Any, layers: list[str]) -> str | None:
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if not type(module).__module__.startswith("torch.nn."):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    kind = _of_all_layers(f"{name}.{key}")
                    sizes[kind] = sizes.get(kind, 0) + parameter.numel()
    lines = []
    if sizes:
        share = sum(sizes.values()) / model.num_parameters()
        lines.append(
            f"the experts, {', '.join(sizes)}, {share:.0%} of the weights, are neither quantized nor adapted: only linear "
            "layers are"
        )
    if layers:
        lines.append(f"left without an adapter: {', '.join(dict.fromkeys(map(_of_all_layers, layers)))}")
    return "; ".join(lines) or None


def _of_all_layers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Raises unless every name in the configuration matches a layer and every rank fits its layer."""
    matched = _matched(model, config.target_modules, _linear_layers(model))
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, number in getattr(config, key).items():
            if not any(get_pattern_key([pattern], name) == pattern for name in matched):
                raise InputError(f"every key of {key} must match an adapted layer ({_names(matched)}), got {pattern!r}")
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"every value of {key} must be an integer >= 1, got {number!r} for {pattern!r}")
    for name, module in matched.items():
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        check_rank(name, rank, *shape_of(module))
    for wanted in config.modules_to_save or []:
        meant = [m for name, m in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not meant:
            raise InputError(f"every name in lora_modules_to_save must be a module of the model, got {wanted!r}")
        if any(isinstance(module, HostEmbedding) for module in meant):
            raise InputError(
                f"lora_modules_to_save {wanted} and offload_embeddings exclude each other; remove one of the two keys"
            )


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _matched(model: Any, target: Any, linear: dict[str, nn.Module]) -> dict[str, nn.Module]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inner = {name: module for name, module in linear.items() if module is not head}
    if target == _ALL_LINEAR:
        matched = inner
    elif isinstance(target, str):
        matched = {name: module for name, module in linear.items() if re.fullmatch(target, name)}
    else:
        matched = {}
        for wanted in target:
            found = {name: module for name, module in linear.items() if name == wanted or name.endswith(f".{wanted}")}
            if not found:
                _refuse(wanted, inner, model)
            matched |= found
    if not matched:
        _refuse(target, inner, model)
    return matched


def _refuse(target: Any, inner: dict[str, nn.Module], model: nn.Module) -> None:
    raise InputError(
        f"lora_target_modules must match a linear layer of {name_of(model) or type(model).__name__}, got {target!r}; it has "
        f"{_names(inner)}, or write {_ALL_LINEAR}"
    )


def _names(layers: dict[str, nn.Module]) -> str:
    return ", ".join(dict.fromkeys(map(_last, layers))) or "none"


def shape_of(module: Any) -> tuple[int, int]:
    """Rows and columns of a linear layer's weight, (out_features, in_features), however it is stored.

    Raises:
        AttributeError: it is no linear layer.
    """
    # transformers' Conv1D stores its weight transposed.
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
