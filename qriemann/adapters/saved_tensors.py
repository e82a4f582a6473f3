"""The weights in an adapter's folder, read without PEFT."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from qriemann.adapters.saved_config import CONFIG, value_for
from qriemann.base.tensors import FLOATS, is_finite
from qriemann.errors import InputError, first_line

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_NAME = re.compile(r"[\w.-]+")
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>[\w.-]+)\.lora_(?P<side>A|B)\.(?P<kind>weight|bias)")
_TOKENS = re.compile(r"base_model\.model\.(?P<module>[\w.-]+)\.token_adapter\.trainable_tokens_delta")
# What PEFT puts into the names of tensors of a module that it wraps.
_WRAPPED = re.compile(r"\.(token_adapter|base_layer|modules_to_save)\b")


class LoraFactors(NamedTuple):
    """The change of one linear layer: scaling B A of its weight, scaling times `bias` of its bias.

    B is m x r and A is r x n.
    """

    b: Tensor
    a: Tensor
    scaling: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class Content:
    """The weights in an adapter's folder.

    Attributes:
        keys: the names of all tensors.
        layers: the change of each layer, by the module's name in the base.
        replaced: whole tensors that were trained (`modules_to_save`, biases), by their name in the base.
        rows: of the embeddings that were trained alone (`trainable_token_indices`): their numbers and values, by the name of
            the tensor in the base.
    """

    keys: frozenset[str]
    layers: dict[str, LoraFactors]
    replaced: dict[str, Tensor]
    rows: dict[str, tuple[list[int], Tensor]]


def read_content(path: Path, config: Mapping[str, Any], *, finite: bool = True) -> Content:
    """The content of an adapter's folder, or of the `adapter_model.bin` in it, checked against its configuration."""
    folder = adapter_folder(path)
    keys: list[str] = []
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    rows: dict[str, tuple[list[int], Tensor]] = {}
    for key, tensor in stored_tensors(_weights_of(path, folder), finite=finite):
        if ".original_module." in key:
            # Of a grown vocabulary PEFT saves what `modules_to_save` replaces as well.
            continue
        keys.append(key)
        match, tokens = _FACTOR.fullmatch(key), _TOKENS.fullmatch(key)
        if match is not None and tensor.ndim == (2 if match["kind"] == "weight" else 1):
            side = match["side"] if match["kind"] == "weight" else f"{match['side']} bias"
            factors.setdefault(match["module"], {})[side] = tensor
        elif tokens is not None:
            rows[f"{tokens['module']}.weight"] = _token_rows(tokens["module"], tensor, config, folder)
        elif "lora_" in key or not _NAME.fullmatch(key):
            raise InputError(
                f"{folder}: not plain LoRA on linear layers: tensor {key!r:.80}; merge it with the tool that trained it"
            )
        else:
            replaced[name_in_base(key)] = tensor
    layers = {name: _factors(name, pair, config, folder) for name, pair in sorted(factors.items())}
    if not layers:
        raise InputError(f"{folder} holds no LoRA layer; check the folder")
    return Content(frozenset(keys), layers, replaced, rows)


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """The path, or the folder of the pickled weights that it names."""
    path = Path(path).expanduser()
    return path.parent if path.name == PICKLE and path.is_file() else path


def name_in_base(key: str) -> str:
    """The base's name for a tensor that was trained whole."""
    return _WRAPPED.sub("", key.removeprefix("base_model.model."))


def stored_tensors(path: Path, *, finite: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file or a pickle, one at a time, in float32."""
    try:
        for key, tensor in _stored(path):
            held = tensor.dtype in FLOATS
            if not held or (finite and not is_finite(tensor)):
                got = f"NaN or infinities in {key!r}" if held else f"{key!r:.80} as {tensor.dtype}"
                raise InputError(f"{path} must hold finite numbers in floating point, got {got}; copy it again")
            yield key, tensor.float()
    except InputError:
        raise
    except Exception as error:  # safetensors and the unpickler raise their own types.
        kind = "pickle of tensors alone" if path.name == PICKLE else "complete safetensors file"
        raise InputError(f"{path} is not a {kind}: {first_line(error)}; copy or train it again") from error


def _weights_of(path: Path, folder: Path) -> Path:
    """The file to read: a pickle only where it is named."""
    weights, pickle = folder / WEIGHTS, folder / PICKLE
    if folder != path and weights.is_file():
        raise InputError(f"{folder} holds {WEIGHTS} beside the pickle; name the folder to read that file")
    if folder == path and not weights.is_file() and pickle.is_file():
        raise InputError(
            f"{folder}: a pickle, where safetensors are wanted; if you trust its author, name the file itself: {pickle}"
        )
    if folder == path and not weights.is_file():
        raise InputError(f"{weights}: no such file; train or copy the adapter again")
    return weights if folder == path else pickle


def _stored(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.name != PICKLE:
        with safe_open(path, "pt") as file:
            for key in file.offset_keys():
                yield key, file.get_tensor(key)
        return
    # By an unpickler that makes tensors and nothing else.
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"it holds {key!r:.80}")
        yield key, tensor


def _token_rows(module: str, values: Tensor, config: Mapping[str, Any], folder: Path) -> tuple[list[int], Tensor]:
    """The numbers of the tokens whose embeddings were trained alone, and these embeddings."""
    named = config.get("trainable_token_indices") or []
    if isinstance(named, dict):
        named = next((numbers for name, numbers in named.items() if f".{module}".endswith(f".{name}")), [])
    if values.ndim != 2 or len(named) != values.shape[0]:
        raise InputError(
            f"{folder}: {module} must have {len(named)} rows of trainable tokens, got {tuple(values.shape)}; copy it again"
        )
    return list(named), values


def _factors(name: str, pair: dict[str, Tensor], config: Mapping[str, Any], folder: Path) -> LoraFactors:
    rank = value_for(config.get("rank_pattern"), name, config["r"])
    bias = pair.pop("B bias", None) if config.get("lora_bias") else None
    if pair.keys() != {"A", "B"} or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
        shapes = {f"lora_{side}": tuple(tensor.shape) for side, tensor in sorted(pair.items())}
        raise InputError(
            f"{folder}: {name} must have factors B and A of the rank {rank} that {CONFIG} says, got {shapes}; copy it again"
        )
    alpha = value_for(config.get("alpha_pattern"), name, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scaling):
        raise InputError(f"lora_alpha must be finite, got {alpha!r} for {name!r} in {folder / CONFIG}")
    return LoraFactors(pair["B"], pair["A"], scaling, bias)
