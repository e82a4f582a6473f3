"""Second tall pass: the new factors and momenta, and the repair of the factor's orthonormality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

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

    Args:
        blocks: U, N and, where the direction differs from the momentum, D; the sides of one height t.
        coefficients: from `core`, (k, p r, 2 r) for p blocks.
        momentum: no block's memory.
        scratch: no block's memory; its contents are lost.

    Returns:
        U^T U of the new factors, for `correct`.

    Cost: 4 p r^2 t + 2 r^2 t flops.
    """
    rank = momentum.shape[-1]
    for out, columns in ((momentum, slice(rank, None)), (scratch, slice(0, rank))):
        torch.bmm(blocks[0], coefficients[:, :rank, columns], out=out)
        for index, block in enumerate(blocks[1:], start=1):
            out.baddbmm_(block, coefficients[:, index * rank : (index + 1) * rank, columns])
    blocks[0].copy_(scratch)
    return inner(blocks[0], blocks[0])


def correct(
    factors: Sequence[Float[Tensor, "_k _t r"]], grams: Sequence[Float[Tensor, "_k r r"]]
) -> Float[Tensor, "b r r"]:
    """Repairs factors that have drifted from orthonormality, U <- U (I + E)^(-1/2) to second order; reads a flag on the host.

    Args:
        factors: of all heights.
        grams: their U^T U = I + E, from `apply`.

    Returns:
        (I + E)^(1/2), to second order, of all factors: what S takes on this side so that X stays as it was.
    """
    e = torch.cat(list(grams))
    e.diagonal(dim1=-2, dim2=-1).sub_(1)
    drifted = vector_norm(e, torch.inf, (-2, -1)) > _CORRECT_ABOVE
    compensation = torch.eye(e.shape[-1], dtype=e.dtype, device=e.device).expand_as(e)
    if drifted.any():
        e = torch.where(drifted[:, None, None], e, 0)
        e_squared = e @ e
        compensation = compensation + e / 2 - e_squared / 8
        of_heights = (e / 2 - 3 / 8 * e_squared).split([len(u) for u in factors])
        for u, drift, here in zip(factors, of_heights, drifted.split([len(u) for u in factors]), strict=True):
            rows = here.nonzero().flatten()
            u[rows] -= u[rows] @ drift[rows]
    return compensation
