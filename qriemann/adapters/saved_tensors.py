"""The weights in an adapter's folder, as NumPy arrays: `inspect` and `report` need not wait for torch.

Refused, with the reason in one line: pickles that were not named, incomplete files, numbers that are not finite, and factors
whose shapes or ranks do not match the configuration.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from qriemann.adapters.saved_config import CONFIG, value_for
from qriemann.errors import InputError

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_NAME = re.compile(r"[\w.-]+")
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>[\w.-]+)\.lora_(?P<side>A|B)\.(?P<kind>weight|bias)")
_TOKENS = re.compile(r"base_model\.model\.(?P<module>[\w.-]+)\.token_adapter\.trainable_tokens_delta")
# What PEFT puts into the names of tensors of a module that it wraps.
_WRAPPED = re.compile(r"\.(token_adapter|base_layer|modules_to_save)\b")
# bfloat16, which NumPy lacks, is the upper half of a float32.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class LoraFactors(NamedTuple):
    """The change of one linear layer: scaling B A of its weight, scaling times `bias` of its bias.

    B is m x r and A is r x n. They are NumPy arrays here and tensors in a `SavedAdapter`.
    """

    b: Any
    a: Any
    scaling: float
    bias: Any = None


class Content(NamedTuple):
    """What a folder's weights are; see `SavedAdapter`, whose fields have these names."""

    keys: frozenset[str]
    layers: dict[str, LoraFactors]
    replaced: dict[str, np.ndarray]
    rows: dict[str, tuple[list[int], np.ndarray]]


def read_content(path: Path, config: Mapping[str, Any], *, finite: bool = True) -> Content:
    """The content of an adapter's weights.

    Args:
        path: the folder, or the `adapter_model.bin` in it.
        config: from `check_config`.
        finite: refuse numbers that are not.
    """
    folder = adapter_folder(path)
    keys: list[str] = []
    factors: dict[str, dict[str, np.ndarray]] = {}
    replaced: dict[str, np.ndarray] = {}
    rows: dict[str, tuple[list[int], np.ndarray]] = {}
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
                f"an adapter must be plain LoRA on linear layers, got the tensor {key!r:.80} of {tensor.shape} in "
                f"{folder}; merge it with the tool that trained it"
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


def stored_tensors(path: Path, *, finite: bool = True) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a safetensors file or a pickle, one at a time; bfloat16 as float32."""
    try:
        for key, dtype, array in _unpickled(path) if path.name == PICKLE else _mapped(path):
            if array is None or (finite and not np.isfinite(array).all()):
                got = f"{key!r:.80} as {dtype}" if array is None else f"NaN or infinities in {key!r}"
                raise InputError(
                    f"{path} must hold finite numbers of {', '.join(_DTYPES)}, got {got}; copy or train it again"
                )
            yield key, array
    except InputError:
        raise
    except Exception as error:  # safetensors, NumPy and the unpickler raise their own types.
        kind = "pickle of tensors alone" if path.name == PICKLE else "complete safetensors file"
        raise InputError(f"{path} is not a {kind}: {first_line(error)}; copy or train it again") from error


def first_line(error: BaseException) -> str:
    """The exception's type and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")


def _weights_of(path: Path, folder: Path) -> Path:
    """The file to read: a pickle only where it is named."""
    weights, pickle = folder / WEIGHTS, folder / PICKLE
    if folder != path and weights.is_file():
        raise InputError(f"{folder} holds {WEIGHTS} beside the pickle; name the folder to read that file")
    if folder == path and not weights.is_file() and pickle.is_file():
        raise InputError(
            f"an adapter's weights must be safetensors, got a pickle in {folder}; if you trust its author, name the file "
            f"itself: {pickle}"
        )
    if folder == path and not weights.is_file():
        raise InputError(f"{weights}: no such file; train or copy the adapter again")
    return weights if folder == path else pickle


def _mapped(path: Path) -> Iterator[tuple[str, str, np.ndarray | None]]:
    """Name, dtype and content of each tensor, mapped from the file; None for a dtype that cannot hold a factor."""
    # It refuses an incomplete file, and cannot read bfloat16 without torch.
    with safe_open(path, "np"):
        pass
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    header.pop("__metadata__", None)
    for key, entry in header.items():
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        array: np.ndarray | None = None
        if dtype in _DTYPES:
            # NumPy maps nothing of no bytes.
            place = {"offset": start + entry["data_offsets"][0], "shape": shape}
            array = np.asarray(np.memmap(path, _DTYPES[dtype], "c", **place) if 0 not in shape else np.zeros(shape))
            if dtype == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
        yield key, dtype, array


def _unpickled(path: Path) -> Iterator[tuple[str, str, np.ndarray | None]]:
    # Only torch reads a pickle, by an unpickler that makes tensors and nothing else.
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"it holds {key!r:.80}")
        held = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        yield (
            key,
            str(tensor.dtype),
            tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy() if held else None,
        )


def _token_rows(
    module: str, values: np.ndarray, config: Mapping[str, Any], folder: Path
) -> tuple[list[int], np.ndarray]:
    """The numbers of the tokens whose embeddings were trained alone, and these embeddings."""
    named = config.get("trainable_token_indices") or []
    if isinstance(named, dict):
        named = next((numbers for name, numbers in named.items() if f".{module}".endswith(f".{name}")), [])
    if values.ndim != 2 or len(named) != values.shape[0]:
        raise InputError(
            f"an adapter must hold a row for each of the {len(named)} trainable_token_indices of its {CONFIG}, got "
            f"{values.shape} for {module} in {folder}; copy or train it again"
        )
    return list(named), values


def _factors(name: str, pair: dict[str, np.ndarray], config: Mapping[str, Any], folder: Path) -> LoraFactors:
    rank = value_for(config.get("rank_pattern"), name, config["r"])
    bias = pair.pop("B bias", None) if config.get("lora_bias") else None
    if pair.keys() != {"A", "B"} or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
        shapes = {f"lora_{side}": tensor.shape for side, tensor in sorted(pair.items())}
        raise InputError(
            f"every layer must have factors B (m x r) and A (r x n) of the rank r = {rank} that {CONFIG} says, got {shapes} "
            f"for {name!r} in {folder}; copy or train it again"
        )
    alpha = value_for(config.get("alpha_pattern"), name, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scaling):
        raise InputError(
            f"lora_alpha must be finite, got {alpha!r} for {name!r} in {folder / CONFIG}; correct the file"
        )
    return LoraFactors(pair["B"], pair["A"], scaling, bias)
