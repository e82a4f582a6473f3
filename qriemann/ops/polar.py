"""The polar factor of small matrices: matrix products first, LAPACK for what they did not settle."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qriemann.ops.svd import svd

# Singular values under this fraction of the largest are noise: the core matrix comes from float32 Gram matrices, which
# resolve about sqrt(2^-24) = 2.4e-4 of the largest direction. They are left at zero, never blown up to one.
POLAR_RTOL = 1e-3
# Matrices with no larger entry are zero: a momentum that only decays ends on float32's least numbers, which 0.9 rounds
# back to themselves.
_ZERO = torch.finfo(torch.float32).tiny


def _newton_schulz_coefficients(lower: float, tol: float) -> list[tuple[float, float, float]]:
    """(l, a, b): the cubics a x + b x^3 that take [lower, 1] to within `tol` of 1 in the fewest steps, each from [l, 1].

    Each cubic c x (3 alpha^2 - x^2) is the minimax one for the interval [l, u] the step before left; with u = 1 its
    maximum lies at alpha^2 = (1 + l + l^2)/3 and it takes both ends to c (l + l^2), so c balances the two errors about 1.
    Closed form of the optimal odd cubics of [Chen & Chow 2014; Amsel et al., arXiv 2505.16932, Section 3].
    """
    coefficients = []
    while 1 - lower > tol:
        alpha_squared = (1 + lower + lower**2) / 3
        at_ends, at_alpha = lower + lower**2, 2 * alpha_squared**1.5
        # Divided by its maximum, so that the next interval ends at 1 again.
        coefficients.append((lower, 3 * alpha_squared / at_alpha, -1 / at_alpha))
        lower = at_ends / at_alpha
    return coefficients


# Bound on ||O - O O^T O||_F^2 for settled matrices. A singular value left at v adds v^2 while float32 adds (3e-7)^2 p.
_SETTLED = 1e-10

# While a wanted singular value is small, float32 would blur its direction by 6e-8 / l; later it costs half as much.
_FLOAT32_ABOVE = 0.2

# 11 steps. Singular values are measured against a norm estimate that exceeds the largest by up to rank^(1/4).
_COEFFICIENTS = _newton_schulz_coefficients(lower=POLAR_RTOL, tol=1e-7)
# The last 8 of them take [0.017, 1] to 1: enough for most momenta, and half of the steps left out are float64 ones.
_SHORT = _COEFFICIENTS[3:]


def polar(k: Float[Tensor, "b p p"]) -> Float[Tensor, "b p p"]:
    """The orthogonal polar factor of each matrix: its singular values set to one, those under the cut-off to zero.

    Newton-Schulz with minimax coefficients settles every matrix whose non-zero singular values lie above the cut-off. An
    SVD recomputes the others, which keep a singular value strictly between 0 and 1. Reads a flag on the host.

    Args:
        k: square matrices; zero gives zero, and so does a matrix of float32 subnormals.
    """
    dtype = k.dtype
    # Scaled, so that no power of an entry leaves float32's range.
    largest = k.abs().amax((-2, -1), keepdim=True)
    k = (k / torch.where(largest > _ZERO, largest, torch.inf)).double()
    # (trace (K^T K)^2)^(1/4) bounds the largest singular value from above, within a factor rank^(1/4).
    norm = (k.mT @ k).square().sum((-2, -1), keepdim=True).sqrt().sqrt()
    x = k / torch.where(norm > 0, norm, 1)
    o = _iterate(x, _SHORT)
    unsettled = _is_unsettled(o)
    if unsettled.any():
        o[unsettled] = _iterate(x[unsettled], _COEFFICIENTS)
        unsettled = _is_unsettled(o)
        if unsettled.any():
            left, sigma, right = svd(k[unsettled])
            keep = (sigma > POLAR_RTOL * sigma[..., :1]).to(k.dtype)
            o[unsettled] = ((left * keep[..., None, :]) @ right).to(o.dtype)
    return o.to(dtype)


def _iterate(x: Float[Tensor, "b p p"], coefficients: list[tuple[float, float, float]]) -> Float[Tensor, "b p p"]:
    for lower, a, b in coefficients:
        if lower > _FLOAT32_ABOVE:
            x = x.float()
        x = torch.baddbmm(x, x, x.mT @ x, beta=a, alpha=b)
    return x


def _is_unsettled(o: Float[Tensor, "b p p"]) -> Bool[Tensor, " b"]:
    """Whether a singular value lies strictly between 0 and 1."""
    return torch.baddbmm(o, o, o.mT @ o, alpha=-1).square().sum((-2, -1)) > _SETTLED
