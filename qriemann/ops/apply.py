"""Second tall pass: the new factor and momentum, and the repair of the factor's orthonormality."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# ||U^T U - I||max above which a new factor is corrected. Float32 rounding alone gives 1e-6; more comes from directions
# that the Gram matrix resolved badly.
_CORRECT_ABOVE = 2e-6


def orthonormality_error(u: Float[Tensor, "k t r"]) -> Float[Tensor, "k r r"]:
    """U^T U - I of each factor."""
    error = u.mT @ u
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    return error


def apply(
    z: Float[Tensor, "k t p"],
    coefficients: Float[Tensor, "k p q"],
    u: Float[Tensor, "k t r"],
    momentum: Float[Tensor, "k t r"],
) -> Float[Tensor, "k r r"]:
    """Writes U+ = z t_1 into `u` and N+ = z t_2 into `momentum`, [t_1, t_2] the coefficients.

    A factor that has drifted from orthonormality is corrected in place, U <- U (I + E)^(-1/2) with E = U^T U - I to
    second order.

    Args:
        z: the sides of one tall dimension t; must not share memory with the outputs.
        coefficients: from `core`, q = 2 r.
        u: overwritten.
        momentum: overwritten.

    Returns:
        (I + E)^(1/2), to second order: the factor that S takes on this side so that X stays as it was.

    Cost: 2 p q t + 2 r^2 t flops; one read of z, one write and one read of U+, one write of N+.
    """
    rank = u.shape[-1]
    torch.bmm(z, coefficients[..., :rank], out=u)
    torch.bmm(z, coefficients[..., rank:], out=momentum)
    error = orthonormality_error(u)
    drifted = (error.abs().amax((-2, -1)) > _CORRECT_ABOVE).nonzero().flatten()
    compensation = torch.eye(rank, dtype=u.dtype, device=u.device).repeat(u.shape[0], 1, 1)
    if drifted.numel():
        e = error[drifted]
        e_squared = e @ e
        u[drifted] -= u[drifted] @ (e / 2 - 3 / 8 * e_squared)
        compensation[drifted] += e / 2 - e_squared / 8
    return compensation
