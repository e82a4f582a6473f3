"""The polar factor of small matrices, by matrix products alone."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vector_norm

# Singular values under this fraction of the largest are noise: the core matrix comes from float32 Gram matrices, which
# resolve about sqrt(2^-24) = 2.4e-4 of the largest direction. They are left at zero, never blown up to one.
POLAR_RTOL = 1e-3
# Matrices with no larger entry are zero: a momentum that only decays ends on float32's least numbers, which 0.9 rounds
# back to themselves.
_ZERO = torch.finfo(torch.float32).tiny


@functools.cache
def _newton_schulz_coefficients(lower: float, enough: float) -> tuple[list[tuple[float, float, float]], float]:
    """(l, a, b), and l in the end: cubics a x + b x^3 that take [l, 1] to [l', 1] for the next, until l' exceeds `enough`.

    Each cubic c x (3 alpha^2 - x^2) is the minimax one for the interval [l, u] the step before left; with u = 1 its
    maximum lies at alpha^2 = (1 + l + l^2)/3 and it takes both ends to c (l + l^2), so c balances the two errors about 1.
    Closed form of the optimal odd cubics of [Chen & Chow 2014; Amsel et al., arXiv 2505.16932, Section 3].
    """
    coefficients = []
    while lower < enough:
        alpha_squared = (1 + lower + lower**2) / 3
        at_ends, at_alpha = lower + lower**2, 2 * alpha_squared**1.5
        # Divided by its maximum, so that the next interval ends at 1 again.
        coefficients.append((lower, 3 * alpha_squared / at_alpha, -1 / at_alpha))
        lower = at_ends / at_alpha
    return coefficients, lower


# Bound on ||O - O O^T O||_F for settled matrices. A singular value left at v adds v^2 to its square, and float32 (3e-7)^2 p.
_SETTLED = 1e-5

# While a wanted singular value is small, float32 would blur its direction by 6e-8 / l; later it costs half as much.
_FLOAT32_ABOVE = 0.2

# 11 steps. Singular values are measured against a norm estimate that exceeds the largest by up to rank^(1/4).
_COEFFICIENTS, _ = _newton_schulz_coefficients(POLAR_RTOL, 1 - 1e-7)
# The last 8 of them take [0.017, 1] to 1: enough for most momenta, and half of the steps left out are float64 ones.
_SHORT = _COEFFICIENTS[3:]

# The quintic (5 x^3 - 3 x^5) / 2 takes values from here to 1.13 to one, and those below to zero.
_WATERSHED = (2 / 3) ** 0.5
# Four quintics move a value away from it by a factor of 8; after 16 times four even a rounding error has decided it.
_ROUNDS = 16
# The cubics take both ends of their interval to the same value. This much above the largest singular value, the upper end
# holds none; the cut-off is the lower one.
_ABOVE = 1.1
# Squarings that leave the mean of the singular values within 0.2 % of the largest.
_SQUARINGS = 10


def polar(k: Float[Tensor, "b p p"], rtol: float = POLAR_RTOL) -> Float[Tensor, "b p p"]:
    """The orthogonal polar factor of each matrix: its singular values set to one, those under the cut-off to zero.

    Newton-Schulz with minimax coefficients settles every matrix whose non-zero singular values lie well above the cut-off.
    The others keep a singular value strictly between 0 and 1, and are cut by `_decided`. Reads a flag on the host.

    Args:
        k: square matrices; zero gives zero, and so does a matrix of float32 subnormals. Late steps are in its dtype.
        rtol: the cut-off, relative to the largest singular value.
    """
    x = k.double()
    # (trace (X^T X)^2)^(1/4) bounds the largest singular value from above, within a factor p^(1/4).
    norm = vector_norm(x.mT @ x, dim=(-2, -1), keepdim=True).sqrt()
    x = x / torch.threshold(norm, k.shape[-1] * _ZERO, torch.inf)
    o = _iterate(x, _SHORT, k.dtype)
    unsettled = _is_unsettled(o)
    if unsettled.any():
        o[unsettled] = _iterate(x[unsettled], _COEFFICIENTS, k.dtype)
        unsettled = _is_unsettled(o)
        if unsettled.any():
            o[unsettled] = _decided(x[unsettled], rtol, k.dtype)
    return o


def _decided(x: Float[Tensor, "b p p"], rtol: float, dtype: torch.dtype) -> Float[Tensor, "b p p"]:
    """The polar factor of matrices that have singular values near the cut-off or under it."""
    square = x.mT @ x
    leading = square.float()
    for _ in range(_SQUARINGS):
        leading = leading @ leading
        leading = leading / leading.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    largest = (leading * square).sum((-2, -1), keepdim=True).sqrt()
    coefficients, reached = _newton_schulz_coefficients(rtol / _ABOVE, _WATERSHED)
    # The cut-off goes to the watershed, and all above it at most to _WATERSHED / reached < 1.
    o = _iterate(x / (_ABOVE * largest), coefficients, dtype) * (_WATERSHED / reached)
    for _ in range(_ROUNDS):
        for _ in range(4):
            square = o.mT @ o
            cube = o @ square
            o = torch.baddbmm(cube, cube, square, beta=2.5, alpha=-1.5)
        if not _is_unsettled(o).any():
            break
    return o


def _iterate(
    x: Float[Tensor, "b p p"], coefficients: list[tuple[float, float, float]], dtype: torch.dtype
) -> Float[Tensor, "b p p"]:
    for lower, a, b in coefficients:
        if lower > _FLOAT32_ABOVE:
            x = x.to(dtype)
        x = torch.baddbmm(x, x, x.mT @ x, beta=a, alpha=b)
    return x


def _is_unsettled(o: Float[Tensor, "b p p"]) -> Bool[Tensor, " b"]:
    """Whether a singular value lies strictly between 0 and 1."""
    return vector_norm(torch.baddbmm(o, o, o.mT @ o, alpha=-1), dim=(-2, -1)) > _SETTLED
