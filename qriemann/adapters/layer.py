"""The adapter layer: y = W x + s U S V^T x, whose backward leaves tangent blocks and divides by nothing.

Everything that leans on PEFT's private `LoraVariant` is in this file and in attach.py; tests/adapters/test_peft_contract.py
says what we rely on.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor

from qriemann.geometry.parameter import FixedRankParameter
from qriemann.geometry.point import FixedRankPoint


class _FixedRankProduct(torch.autograd.Function):
    """s (U S V^T - U_0 S_0 V_0^T) x, with the tangent blocks G V and G^T U as the gradients of U and V."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*tokens n"],
        u: Float[Tensor, "m r"],
        v_transposed: Float[Tensor, "r n"],
        s: Float[Tensor, "r r"],
        scaling: float,
        offset: FixedRankPoint | None,
    ) -> Float[Tensor, "*tokens m"]:
        dtype = x.dtype
        z = x @ v_transposed.mT.to(dtype)
        y = z @ (u @ s).mT.mul(scaling).to(dtype)
        frozen = None
        if offset is not None:
            # U_0 S_0 is folded once: it never changes, and neither block needs it.
            frozen = (offset.u @ offset.s).mul(-scaling).to(dtype), offset.v.to(dtype)
            y = y + (x @ frozen[1]) @ frozen[0].mT
        ctx.save_for_backward(x, z, u, v_transposed, s, *(frozen or ()))
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Float[Tensor, "*tokens m"]) -> tuple[Tensor | None, ...]:
        x, z, u, v_transposed, s, *frozen = ctx.saved_tensors
        dtype = x.dtype
        grad_y = grad_y.to(dtype)
        h = grad_y @ u.to(dtype)
        grad_x = grad_u = grad_v = None
        if ctx.needs_input_grad[1]:
            grad_u = _float32_product(grad_y, z).mul_(ctx.scaling)
        if ctx.needs_input_grad[2]:
            grad_v = _float32_product(x, h).mul_(ctx.scaling).mT
        if ctx.needs_input_grad[0]:
            grad_x = h @ (s @ v_transposed).mul(ctx.scaling).to(dtype)
            if frozen:
                grad_x = grad_x + (grad_y @ frozen[0]) @ frozen[1].mT
        return grad_x, grad_u, grad_v, None, None, None


def _float32_product(left: Float[Tensor, "*tokens m"], right: Float[Tensor, "*tokens r"]) -> Float[Tensor, "m r"]:
    """left^T right summed over all tokens, accumulated and returned in float32 whatever the inputs' dtype."""
    left, right = left.flatten(0, -2), right.flatten(0, -2)
    if left.dtype == torch.float32:
        return left.mT @ right
    if left.is_cuda:
        return torch.mm(left.mT, right, out_dtype=torch.float32)
    return left.mT.float() @ right.float()


class FixedRankVariant(LoraVariant):
    """A PEFT LoRA layer whose adapter is the point X = U S V^T: lora_B.weight is U, lora_A.weight is V^T.

    `.grad` of the two is not the partial derivative of the loss. It is G V and (G^T U)^T, with G = dL/dX: the two blocks
    of the projection of G onto the tangent space. They do not contain S, so S = 0 (the LoRA start) and a singular S are
    ordinary points, and only an optimizer that knows the manifold can use them.

    The products run in the activation's dtype, or in autocast's; the blocks are accumulated in float32.

    Attributes:
        point: U, S, V and the frozen offset that is subtracted, if any.
    """

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
        point.follow_device()
        scaling = module.scaling[active_adapter]
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else result.dtype
        x = module.lora_dropout[active_adapter](x.to(dtype))
        with torch.autocast(device_type, enabled=False):
            update = _FixedRankProduct.apply(x, point.u, point.v_transposed, point.s, scaling, point.offset)
        bias = module.lora_B[active_adapter].bias
        if bias is not None:
            update = update + bias.to(dtype) * scaling
        return result + update.to(result.dtype)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight.float() + _delta_weight(module, active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.copy_(FixedRankVariant.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight.float() - _delta_weight(module, active_adapter)).to(orig_weight.dtype)


def _delta_weight(module: LoraLayer, active_adapter: str) -> Float[Tensor, "m n"]:
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
