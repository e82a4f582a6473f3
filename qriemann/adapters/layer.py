"""The adapter layer: y = W x + s U S V^T x, whose backward leaves tangent blocks and divides by nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from qriemann.geometry.parameter import FixedRankParameter, Operands
from qriemann.upstream.tuners import LoraVariant


class _Dropout(NamedTuple):
    """Which inputs are dropped, as a rate and a seed, so that backward draws the mask again and nothing keeps it.

    The rate is a multiple of 2^-16, so that 16 random bits decide each input. On the CPU this takes a twelfth of the time of
    `bernoulli_`, which took a sixth of a training step.
    """

    sixteen_bit_rate: int
    seed: int

    @property
    def keeps(self) -> float:
        """The share of the inputs that is not dropped."""
        return 1 - self.sixteen_bit_rate / 2**16

    def mask(self, x: Float[Tensor, "*tokens n"]) -> Bool[Tensor, "*tokens n"]:
        """False where `x` is dropped. The factor 1 / keeps of the others belongs to the scaling."""
        # The meta device, on which memory is counted, has no generators.
        generator = torch.Generator("cpu" if x.is_meta else x.device).manual_seed(self.seed)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
        return bits.view(x.shape) >= self.sixteen_bit_rate - 2**15


class _FixedRankSum(torch.autograd.Function):
    """y + s (U S V^T - U_0 S_0 V_0^T) x, with the tangent blocks G V and G^T U as the gradients of U and V.

    Kept for backward: x itself, the same tensor that the other layers that read it keep, and its product with V, a
    few columns for each token. Backward casts and drops x again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Float[Tensor, "*tokens m"],
        x: Float[Tensor, "*tokens n"],
        u: Float[Tensor, "m r"],
        v_transposed: Float[Tensor, "r n"],
        operands: Operands,
        dropout: _Dropout | None,
    ) -> Float[Tensor, "*tokens m"]:
        dtype = operands.v.dtype
        seen = x.to(dtype) if dropout is None else x.to(dtype) * dropout.mask(x)
        # One product for the point and its offset, so that x is read once.
        z = seen @ operands.v
        rank = u.shape[1]
        ctx.save_for_backward(x, z[..., :rank])
        # Not saved as tensors are: hooks would move them with the activations, layer by layer.
        ctx.operands, ctx.version, ctx.dropout = operands, operands.v._version, dropout
        folded = operands.u[:, rank:].mT
        # Into the base's output, for one launch and one tensor less. Autograd takes no view of a custom function's.
        if y.dtype == dtype and y.is_contiguous() and not y._is_view():
            y.view(-1, y.shape[-1]).addmm_(z.flatten(0, -2), folded)
            ctx.mark_dirty(y)
            return y
        return (z @ folded).to(y.dtype).add_(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Float[Tensor, "*tokens m"]) -> tuple[Tensor | None, ...]:
        x, z = ctx.saved_tensors
        operands, dropout = ctx.operands, ctx.dropout
        if operands.v._version != ctx.version:
            raise RuntimeError("an adapter's factors changed between two passes forward and the backward of the first")
        dtype, rank = operands.v.dtype, z.shape[-1]
        g = grad_y.to(dtype)
        h = g @ operands.u
        grad_x = grad_u = grad_v = None
        mask = None if dropout is None else dropout.mask(x)
        if ctx.needs_input_grad[2]:
            grad_u = float32_product(g, z)
        if ctx.needs_input_grad[3]:
            seen = x.to(dtype) if mask is None else x.to(dtype) * mask
            grad_v = float32_product(seen, h[..., :rank]).mT
        if ctx.needs_input_grad[1]:
            grad_x = h[..., rank:] @ operands.v.mT
            grad_x = (grad_x if mask is None else grad_x * mask).to(x.dtype)
        return grad_y, grad_x, grad_u, grad_v, *[None] * 2


def float32_product(left: Float[Tensor, "*tokens m"], right: Float[Tensor, "*tokens r"]) -> Float[Tensor, "m r"]:
    """left^T right summed over all tokens, accumulated and returned in float32 whatever the inputs' dtype."""
    left, right = left.flatten(0, -2), right.flatten(0, -2)
    if left.dtype == torch.float32:
        return left.mT @ right
    # Older ROCm builds of torch lack this argument.
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left.mT, right, out_dtype=torch.float32)
    return left.mT.float() @ right.float()


class FixedRankVariant(LoraVariant):
    """A PEFT LoRA layer whose adapter is the point X = U S V^T: lora_B.weight is U, lora_A.weight is V^T.

    `.grad` of the two is not the partial derivative of the loss. It is G V and (G^T U)^T, with G = dL/dX: the two blocks
    that define the projection of G onto the tangent space. They do not contain S, so S = 0 (the LoRA start) and a singular S
    are ordinary points, and only an optimizer that knows the manifold can use them.

    The products run in the activation's dtype, or in autocast's; the blocks are accumulated in float32.

    Attributes:
        point: U, S, V and the frozen offset that is subtracted, if any.
    """

    #: The layer need not cast its input; see `qriemann.upstream.keep_input_dtype`.
    takes_any_dtype = True

    def __init__(self, point: FixedRankParameter) -> None:
        self.point = point

    def supports_lora_conversion(self) -> bool:
        return True

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Float[Tensor, "*tokens m"]:
        """The base layer's result plus the adapter's, in the result's dtype."""
        point = module.lora_variant[active_adapter].point
        scaling = module.scaling[active_adapter]
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else result.dtype
        dropout, layer_dropout = None, module.lora_dropout[active_adapter]
        if layer_dropout.training and (rate := getattr(layer_dropout, "p", 0.0)) > 0:
            dropout = _Dropout(round(rate * 2**16), int(torch.randint(2**62, (), device="cpu")))
            scaling = scaling / dropout.keeps if dropout.keeps else 0.0
        operands = point.operands(scaling, dtype)
        result = _FixedRankSum.apply(result, x, point.u, point.v_transposed, operands, dropout)
        bias = module.lora_B[active_adapter].bias
        if bias is not None:
            result = result + (bias * module.scaling[active_adapter]).to(result.dtype)
        return result

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight.float() + delta_weight(module, active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.copy_(FixedRankVariant.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight.float() - delta_weight(module, active_adapter)).to(orig_weight.dtype)


def delta_weight(module: LoraLayer, active_adapter: str) -> Float[Tensor, "m n"]:
    """s (X - X_0) in the layout of the base weight."""
    b, a = lora_factors(module.lora_variant[active_adapter].point)
    delta = (b @ a) * module.scaling[active_adapter]
    return delta.mT if getattr(module, "fan_in_fan_out", False) else delta


def lora_factors(point: FixedRankParameter) -> tuple[Float[Tensor, "m q"], Float[Tensor, "q n"]]:
    """Plain LoRA factors B, A with B A = X - X_0: rank r without an offset, 2 r with one."""
    current = point.point()
    b, a = current.u @ current.s, current.v.mT
    if point.offset is not None:
        b = torch.cat([b, -(point.offset.u @ point.offset.s)], 1)
        a = torch.cat([a, point.offset.v.mT])
    return b, a
