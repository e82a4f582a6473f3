"""The adapter layer: y = W x + s U S V^T x, whose backward leaves tangent blocks and divides by nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from qriemann.geometry.parameter import FixedRankParameter
from qriemann.geometry.point import FixedRankPoint
from qriemann.upstream import LoraVariant


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


class _FixedRankProduct(torch.autograd.Function):
    """s (U S V^T - U_0 S_0 V_0^T) x, with the tangent blocks G V and G^T U as the gradients of U and V.

    Kept for backward: x itself, the same tensor that the other layers that read it keep, and its product with the bases, a
    few columns for each token. Backward casts and drops x again, and folds the factors again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*tokens n"],
        u: Float[Tensor, "m r"],
        v_transposed: Float[Tensor, "r n"],
        s: Float[Tensor, "r r"],
        scaling: float,
        offset: FixedRankPoint | None,
        dtype: torch.dtype,
        dropout: _Dropout | None,
    ) -> Float[Tensor, "*tokens m"]:
        seen = x.to(dtype) if dropout is None else x.to(dtype) * dropout.mask(x)
        # One product for the point and its offset, so that x is read once.
        z = seen @ _beside(v_transposed.mT, offset and offset.v, dtype)
        y = z @ _beside((u @ s) * scaling, offset and (offset.u @ offset.s) * -scaling, dtype).mT
        ctx.save_for_backward(x, z[..., : s.shape[0]], u, v_transposed, s)
        ctx.scaling, ctx.offset, ctx.dtype, ctx.dropout = scaling, offset, dtype, dropout
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Float[Tensor, "*tokens m"]) -> tuple[Tensor | None, ...]:
        x, z, u, v_transposed, s = ctx.saved_tensors
        scaling, offset, dtype, dropout = ctx.scaling, ctx.offset, ctx.dtype, ctx.dropout
        grad_y = grad_y.to(dtype)
        h = grad_y @ _beside(u, offset and offset.u, dtype)
        grad_x = grad_u = grad_v = None
        mask = None if dropout is None else dropout.mask(x)
        if ctx.needs_input_grad[1]:
            grad_u = float32_product(grad_y, z).mul_(scaling)
        if ctx.needs_input_grad[2]:
            seen = x.to(dtype) if mask is None else x.to(dtype) * mask
            grad_v = float32_product(seen, h[..., : s.shape[0]]).mul_(scaling).mT
        if ctx.needs_input_grad[0]:
            frozen = offset and (offset.v @ offset.s.mT) * -scaling
            grad_x = h @ _beside((v_transposed.mT @ s.mT) * scaling, frozen, dtype).mT
            grad_x = (grad_x if mask is None else grad_x * mask).to(x.dtype)
        return grad_x, grad_u, grad_v, *[None] * 5


def _beside(
    current: Float[Tensor, "d r"], frozen: Float[Tensor, "d q"] | None, dtype: torch.dtype
) -> Float[Tensor, "d k"]:
    """The point's columns and then the offset's, in the dtype of the products."""
    return (current if frozen is None else torch.cat([current, frozen], 1)).to(dtype)


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
        point.follow()
        scaling = module.scaling[active_adapter]
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else result.dtype
        dropout, layer_dropout = None, module.lora_dropout[active_adapter]
        if layer_dropout.training and (rate := getattr(layer_dropout, "p", 0.0)) > 0:
            dropout = _Dropout(round(rate * 2**16), int(torch.randint(2**62, (), device="cpu")))
            scaling = scaling / dropout.keeps if dropout.keeps else 0.0
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            update = _FixedRankProduct.apply(
                x, point.u, point.v_transposed, point.s, scaling, point.offset, dtype, dropout
            )
        bias = module.lora_B[active_adapter].bias
        if bias is not None:
            update = update + bias.to(dtype) * module.scaling[active_adapter]
        # In place: a fresh tensor of every layer's output costs a CPU as much as the sum.
        return update.to(result.dtype).add_(result)

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
    """s (X - X_0), laid out as the base weight is."""
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
