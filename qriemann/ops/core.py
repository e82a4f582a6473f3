"""The step itself, on r x r and 2r x 2r matrices only: project, direction, retract and transport.

Both sides go through the same products, stacked: index 0 is the U of every layer, index 1 the V.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vector_norm

from qriemann.ops.factor import factor_gram
from qriemann.ops.polar import polar
from qriemann.ops.truncate import truncate

MomentumForm = Literal["raw", "orthogonalized"]


class CoreResult(NamedTuple):
    """What a step needs beside the tall columns.

    Attributes:
        coefficients: (2, b, p r, 2 r): [U+, N+] = [U, N, D] t on side 0, likewise for V on side 1.
        s: (b, r, r), the new S.
        moved: (b,), the active layers with finite Gram matrices.
        all_finite: whether the host knows already that every Gram matrix is finite.
    """

    coefficients: Float[Tensor, "2 b p q"]
    s: Float[Tensor, "b r r"]
    moved: Bool[Tensor, " b"]
    all_finite: bool = False


def core(
    gram: Float[Tensor, "2 b p q"],
    s: Float[Tensor, "b r r"],
    lr: Float[Tensor, " b"],
    weight_decay: Float[Tensor, " b"],
    active: Bool[Tensor, " b"],
    *,
    tangent_iterations: int = 1,
    momentum_form: MomentumForm = "raw",
    block_scale: Float[Tensor, "2 b"] | None = None,
) -> CoreResult:
    """Coefficients of the new factors and of the transported momentum. [arXiv 2507.12142, Algorithm 4]

    Args:
        gram: from `ops.gram`, on side 0 of [U, N] or [U, N, D] with the momentum's blocks N = M V and the direction's
            D where it differs (Nesterov); on side 1 of V with N = M^T U.
        s: the core S of the point.
        lr: spectral norm of the step of X, a layer.
        weight_decay: decoupled, on X, a layer.
        active: layers to move; the others, and those whose Gram matrices are not finite, keep point and momentum.
        tangent_iterations: rounds of polar and projection; 1 is Riemannion, 3 to 5 LoRA-TSD's direction.
        momentum_form: what the transported momentum is: the raw one, or the direction (the paper's Algorithm 4, line 6).
        block_scale: None for the polar direction; else the direction is a_0 A V^T + a_1 U B^T, B = M^T U in full.

    Differences of Gram matrices and the retraction are taken in float64, the rest in the dtype of `s`.
    """
    rank = s.shape[-1]
    # A NaN is less than nothing.
    moved = active & (vector_norm(gram, torch.inf, (0, -2, -1)) < torch.inf)
    gram = torch.where(moved[:, None, None], gram, 0)

    # Project: N = U C + A on side 0, N = V C^T + B on side 1, with A^T A = N^T N - C^T C.
    core_direction, squared = gram[:, :, :rank, -rank:], gram[:, :, -rank:, -rank:].double()
    exact = core_direction.double()
    # The rounding of the difference is relative to what it is taken from.
    # A Gram matrix that was made zero for its layer has no direction.
    r_factor, r_inverse, all_finite = factor_gram(squared - exact.mT @ exact, squared.diagonal(dim1=-2, dim2=-1).sqrt())
    r_inverse = r_inverse.to(s.dtype)

    # Direction: D = [U Q_A] K [V Q_B]^T. Both sides measure C.
    k = s.new_zeros(s.shape[0], 2 * rank, 2 * rank)
    torch.lerp(core_direction[0], core_direction[1].mT, 0.5, out=k[:, :rank, :rank])
    k[:, :rank, rank:] = r_factor[1].mT
    k[:, rank:, :rank] = r_factor[0]
    lr = lr.double()
    if block_scale is None:
        for _ in range(tangent_iterations):
            k = polar(k)
            k[:, rank:, rank:] = 0
    else:
        k[:, :rank] *= block_scale[1, :, None, None]
        k[:, rank:, :rank] *= block_scale[0, :, None, None]

    # Retract.
    y = k * -lr[:, None, None]
    y[:, :rank, :rank].addcmul_((1 - lr * weight_decay)[:, None, None], s)
    bases, s_new = truncate(y)
    bases = bases.to(s.dtype)
    first, second = bases[:, :, :rank], bases[:, :, rank:]

    t = s.new_zeros(2, s.shape[0], gram.shape[-2], 2 * rank)
    # U+ = U P_1 + Q_A P_2, with Q_A = (D - U C) R^-1.
    of_direction = r_inverse @ second
    t[:, :, :rank, :rank] = first - core_direction @ of_direction
    t[:, :, -rank:, :rank] = of_direction
    # Transport: at the new point M = N V^T + U B^T has the blocks M V+ = N W_1 + U (B^T V+) and, likewise, M^T U+.
    if momentum_form == "raw":
        cross = gram[:, :, rank : 2 * rank, -rank:] - gram[:, :, :rank, :rank].mT @ core_direction
        t[:, :, :rank, rank:] = (cross @ of_direction).flip(0)
        t[:, :, rank : 2 * rank, rank:] = first.flip(0)
    else:
        o_core = torch.stack([k[:, :rank, :rank], k[:, :rank, :rank].mT])
        o_normal = torch.stack([k[:, rank:, :rank], k[:, :rank, rank:].mT])
        carried = r_inverse @ o_normal @ first.flip(0)
        t[:, :, :rank, rank:] = o_core @ first.flip(0) + (o_normal.mT @ second).flip(0) - core_direction @ carried
        t[:, :, -rank:, rank:] = carried

    keep = moved[:, None, None]
    t = torch.where(keep, t, torch.eye(gram.shape[-2], 2 * rank, dtype=s.dtype, device=s.device))
    return CoreResult(t, torch.where(keep, s_new.to(s.dtype), s), moved, all_finite)
