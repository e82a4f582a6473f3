"""Tensors by name, each made when it is asked for, and whether tensors hold finite numbers only."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qriemann.geometry.parameter import CountedWrites

# The dtypes for which torch computes the least and the greatest.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Tensors(Mapping[str, Tensor]):
    """A mapping whose values `read` makes from their names, anew at each access."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def is_finite(tensor: Tensor) -> bool:
    """False if the tensor holds NaN or an infinity; integers and 8-bit floats pass. Waits for the device."""
    if tensor.dtype not in FLOATS or not tensor.numel():
        return True
    # A NaN reaches both extremes; isfinite() takes 25 times as long on CPUs, and memory of the tensor's size.
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def find_not_finite(content: Any, name: str = "") -> str | None:
    """The name of a tensor or number inside nested dictionaries and lists that is not finite, or None."""
    if isinstance(content, Mapping):
        items = ((f"{name}.{key}" if name else f"{key}", item) for key, item in content.items())
        return next((broken for key, item in items if (broken := find_not_finite(item, key)) is not None), None)
    if isinstance(content, list | tuple):
        return find_not_finite(dict(enumerate(content)), name)
    # Other subclasses, such as 8-bit optimizer states, may lack the operation.
    if isinstance(content, CountedWrites) or type(content) in (Tensor, nn.Parameter):
        assert isinstance(content, Tensor)
        return None if is_finite(content) else name
    # An infinite number is legitimate: schedulers start with an infinite best value.
    return name if isinstance(content, float) and math.isnan(content) else None
