"""Which layers get an adapter, checked on the base model before it is built."""

import re
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from qriemann.base.host_embedding import HostEmbedding
from qriemann.errors import InputError
from qriemann.upstream import get_pattern_key, name_of

_ALL_LINEAR = "all-linear"


def adapter_config(settings: Any) -> LoraConfig:
    """PEFT's configuration of an adapter.

    Args:
        settings: anything with the attributes lora_r, lora_alpha, lora_dropout, lora_target_modules, lora_modules_to_save,
            use_rslora, rank_pattern and alpha_pattern.
    """
    names = list(settings.lora_target_modules)
    # One word names a layer, as several do; anything else alone is PEFT's: a pattern for the whole path, or all-linear.
    alone = len(names) == 1 and (names[0] == _ALL_LINEAR or not re.fullmatch(r"[\w.]+", names[0]))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha if settings.lora_alpha is not None else settings.lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules=names[0] if alone else names or _ALL_LINEAR,
        use_rslora=settings.use_rslora,
        modules_to_save=settings.lora_modules_to_save and list(settings.lora_modules_to_save),
        rank_pattern=settings.rank_pattern or {},
        alpha_pattern=settings.alpha_pattern or {},
    )


def check_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """The layers that get an adapter, each name in the configuration matching one and each rank fitting its layer.

    Raises:
        InputError: naming what would match, or the layer whose rank is too high.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    matched = _matched(model, config.target_modules, linear)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, number in getattr(config, key).items():
            if not any(get_pattern_key([pattern], name) == pattern for name in matched):
                raise InputError(
                    f"every key of {key} must match a layer with an adapter, got {pattern!r}; these layers have one: "
                    f"{_names(matched)}"
                )
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(
                    f"every value of {key} must be an integer of at least 1, got {number!r} for {pattern!r}"
                )
    for name, module in matched.items():
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        rows, columns = _shape(module)
        if rank > min(rows, columns):
            raise InputError(
                f"the rank must be at most min(out_features, in_features) = {min(rows, columns)} of {name} ({rows} x "
                f"{columns}), got {rank}; lower lora_r or name this layer in rank_pattern"
            )
    for wanted in config.modules_to_save or []:
        meant = [m for name, m in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not meant:
            raise InputError(f"every name in lora_modules_to_save must be a module of the model, got {wanted!r}")
        if any(isinstance(module, HostEmbedding) for module in meant):
            raise InputError(
                f"lora_modules_to_save must not name the input embeddings with offload_embeddings, got {wanted!r}; in host "
                "memory they are frozen; remove one of the two keys"
            )
    return list(matched)


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
        f"lora_target_modules must match at least one linear layer of {name_of(model) or type(model).__name__}, got "
        f"{target!r}; its linear layers are {_names(inner)}, or write {_ALL_LINEAR}"
    )


def _names(layers: dict[str, nn.Module]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers)) or "none"


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    # transformers' Conv1D stores its weight transposed.
    columns, rows = module.get_parameter("weight").shape
    return rows, columns
