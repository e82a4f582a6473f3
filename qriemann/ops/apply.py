"""Second tall pass: the new factor and momentum, and the repair of the factor's orthonormality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qriemann.ops.gram import inner

# ||U^T U - I||max above which a new factor is corrected. Float32 rounding alone gives 1e-6; more comes from directions
# that the Gram matrix resolved badly.
_CORRECT_ABOVE = 2e-6


def orthonormality_error(u: Float[Tensor, "k t r"]) -> Float[Tensor, "k r r"]:
    """U^T U - I of each factor."""
    error = inner(u, u)
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    return error


def apply(
    blocks: Sequence[Float[Tensor, "k t r"]],
    coefficients: Float[Tensor, "k p q"],
    momentum: Float[Tensor, "k t r"],
    scratch: Float[Tensor, "k t r"],
) -> Float[Tensor, "k r r"]:
    """Overwrites U = blocks[0] with [U, N, D] t_1 and `momentum` with [U, N, D] t_2, [t_1, t_2] the coefficients.

    A factor that has drifted from orthonormality is corrected, U <- U (I + E)^(-1/2) with E = U^T U - I to second order.

    Args:
        blocks: U, N and, where the direction differs from the momentum, D; the sides of one height t.
        coefficients: from `core`, (k, p r, 2 r) for p blocks.
        momentum: no block's memory.
        scratch: no block's memory; its contents are lost.

    Returns:
        (I + E)^(1/2), to second order: the factor that S takes on this side so that X stays as it was.

    Cost: 4 p r^2 t + 2 r^2 t flops.
    """
    rank = momentum.shape[-1]
    for out, columns in ((momentum, slice(rank, None)), (scratch, slice(0, rank))):
        torch.bmm(blocks[0], coefficients[:, :rank, columns], out=out)
        for index, block in enumerate(blocks[1:], start=1):
            out.baddbmm_(block, coefficients[:, index * rank : (index + 1) * rank, columns])
    u = blocks[0].copy_(scratch)
    error = orthonormality_error(u)
    compensation = torch.eye(rank, dtype=u.dtype, device=u.device).repeat(u.shape[0], 1, 1)
    drifted = (error.abs().amax((-2, -1)) > _CORRECT_ABOVE).nonzero().flatten()
    if drifted.numel():
        e = error[drifted]
        e_squared = e @ e
        u[drifted] -= u[drifted] @ (e / 2 - 3 / 8 * e_squared)
        compensation[drifted] += e / 2 - e_squared / 8
    return compensation
