"""A 4-bit base that computes on a CPU: its weights dequantized once instead of at each use.

bitsandbytes dequantizes a weight in every forward and again in every backward, which on a CPU is about a tenth of a training
step. Here a plain float copy stands beside the 4-bit bytes, which stay what they are: they alone are saved, merged and
fingerprinted. The products are the same to the bit; a float32 copy takes 4 bytes a weight.
"""

import copyreg
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from qriemann.device import free_bytes
from qriemann.upstream import is_repacked

# The share of the free memory that copies may take: activations, gradients and the optimizer need the rest.
_SHARE = 0.5


@dataclass(frozen=True)
class DenseWeights:
    """What became of the dequantized copies of a model."""

    held: bool
    layers: int
    bytes: int

    def __str__(self) -> str:
        size = f"{self.bytes / 2**30:.2f} GiB"
        if self.held:
            return f"the 4-bit weights of {self.layers} layers are also held dequantized, {size}: faster on a CPU"
        return f"4-bit weights are dequantized at each use: a copy of {size} would take over half of the free memory"


class _Copy(NamedTuple):
    """A dequantized weight, and what it was made from."""

    weight: Tensor
    quant_state: Any
    address: int


class DenseLinear4bit(bnb.nn.Linear4bit):
    """A `Linear4bit` that multiplies by a dequantized copy while it has one of its present weight.

    The copy is no parameter and no buffer. It is left behind by a move to a GPU and by whatever replaces the 4-bit bytes,
    such as PEFT's merge; copies and pickles of the layer are stock `Linear4bit` layers.
    """

    _copy: _Copy | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dense_weight()
        if weight is None:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    def dense_weight(self) -> Tensor | None:
        """The copy, if it is one of the present weight in the present compute dtype."""
        copy = self._copy
        if copy is None:
            return None
        packed: Any = self.weight
        if (
            packed.data_ptr() == copy.address
            and packed.quant_state is copy.quant_state
            and self.compute_dtype == copy.weight.dtype
        ):
            return copy.weight
        self._copy = None
        return None

    def hold(self) -> None:
        """Makes the copy."""
        packed: Any = self.weight
        with torch.inference_mode(False), torch.no_grad():
            weight = dequantize_4bit(packed.data, packed.quant_state)
        self._copy = _Copy(weight, packed.quant_state, packed.data_ptr())

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_copy"}
        return copyreg._reconstructor, (bnb.nn.Linear4bit, object, None), state  # type: ignore[attr-defined]


def hold_dense(model: nn.Module) -> DenseWeights | None:
    """Holds the 4-bit weights of `model` dequantized as well, where they are on the CPU and memory allows.

    Gives what dequantizing at each use gives, bit for bit. Calling it again copies only what has no copy.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit) and _can_be_held(layer)]
    if not layers:
        return None
    missing = [
        layer for layer in layers if not (isinstance(layer, DenseLinear4bit) and layer.dense_weight() is not None)
    ]
    held = fits(sum(map(_dense_bytes, missing)))
    for layer in missing if held else ():
        layer.__class__ = DenseLinear4bit
        layer.hold()
    return DenseWeights(held, len(layers), sum(map(_dense_bytes, layers)))


def fits(needed: int) -> bool:
    """Whether copies of so many bytes leave enough of the memory that is free now to each process of this machine."""
    return needed <= _SHARE * free_bytes(torch.device("cpu")) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _can_be_held(layer: Any) -> bool:
    state = getattr(layer.weight, "quant_state", None)
    # bitsandbytes computes the gradient with weights rounded to the dtype that was quantized: with another compute dtype one
    # copy cannot give both products to the bit. A layer repacked for inference cannot be dequantized.
    return (
        state is not None
        and layer.weight.device.type == "cpu"
        and state.dtype == layer.compute_dtype
        and not is_repacked(layer)
    )


def _dense_bytes(layer: Any) -> int:
    return layer.in_features * layer.out_features * layer.compute_dtype.itemsize
