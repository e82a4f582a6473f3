"""The tensors in an adapter's files, one at a time, refused where they cannot be trusted or are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qriemann.base.finite import is_finite
from qriemann.errors import InputError

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def finite_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, one at a time.

    Raises:
        InputError: the file is incomplete, or holds anything but finite floating-point numbers.
    """
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                dtype = file.get_slice(key).get_dtype()
                yield key, _checked(path, key, dtype, file.get_tensor(key) if dtype in _DTYPES else None)
    except InputError:
        raise
    except Exception as error:  # safetensors and torch raise their own types.
        raise InputError(
            f"{path} is not a complete safetensors file: {first_line(error)}; copy or train it again"
        ) from error


def stored_tensors(folder: Path, *, pickled: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the adapter in a folder, from its pickle if `pickled`.

    Raises:
        InputError: there are none of that kind, or they are not finite.
    """
    if (folder / WEIGHTS).is_file():
        if pickled:
            raise InputError(f"{folder} holds {WEIGHTS} beside the pickle; name the folder to read that file")
        return finite_tensors(folder / WEIGHTS)
    if not (folder / PICKLE).is_file():
        raise InputError(f"{folder / WEIGHTS}: no such file; train or copy the adapter again")
    if not pickled:
        raise InputError(
            f"an adapter's weights must be safetensors, got a pickle in {folder}; if you trust its author, name the file "
            f"itself: {folder / PICKLE}"
        )
    return _unpickled(folder / PICKLE)


def _unpickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A broken file makes the unpickler raise exceptions of any type.
        raise InputError(
            f"{path} must be a pickle of tensors alone, got {type(error).__name__}; copy or train it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must map names to tensors, got a {type(content).__name__}; copy or train it again")
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path} must map names to tensors, got {key!r:.80}; copy or train it again")
        yield key, _checked(path, key, str(tensor.dtype), tensor if tensor.dtype in _DTYPES.values() else None)


def _checked(path: Path, key: str, dtype: str, tensor: Tensor | None) -> Tensor:
    """The tensor if its numbers are finite; None stands for a dtype that cannot hold a factor."""
    if tensor is None or not is_finite(tensor):
        got = f"{key!r:.80} as {dtype}" if tensor is None else f"NaN or infinities in {key!r}"
        raise InputError(f"{path} must hold finite numbers of {', '.join(_DTYPES)}, got {got}; copy or train it again")
    return tensor


def first_line(error: BaseException) -> str:
    """The exception's type and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")
