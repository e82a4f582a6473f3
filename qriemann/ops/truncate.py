"""The best rank-r approximation of a 2r x 2r matrix that is known to have rank-r dominant structure."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qriemann.ops.factor import orthonormalize

_SUBSPACE_ITERATIONS = 2
# Relative to the norm of y. Where y has rank below r (a cold start with a rank-deficient gradient), this much of the old
# factors fills the missing directions; a QR would invent columns that exist in neither basis.
_FILL = 1e-6
# How far U and V may be from the dominant subspaces, relative to y: what float32 factors can hold.
_CONVERGED = 1e-7


def truncate(
    y: Float[Tensor, "b p p"], perturbation: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b p r"], Float[Tensor, "b r r"], Float[Tensor, "b p r"]]:
    """P, S, W with P S W^T the best rank-r approximation of y, P and W orthonormal.

    Subspace iteration from the old factors, whose error falls by (perturbation/sigma_r)^2 a round: on a flat stretch of
    the manifold two rounds are exact. A certificate decides whether they were; what is not certified goes to an SVD.

    Args:
        y: float64, in the bases [U, Q_A], [V, Q_B].
        perturbation: bound on the spectral norm of y outside the leading r x r block's rows, so that
            sigma_{r+1}(y) <= perturbation.
    """
    batch, size, _ = y.shape
    rank = size // 2
    norm = y.square().sum((-2, -1)).sqrt()
    old = torch.zeros(size, rank, dtype=y.dtype, device=y.device)
    old[:rank].fill_diagonal_(1)
    fill = _FILL * torch.where(norm > 0, norm, 1)
    filled = y.clone()
    filled[:, :rank, :rank].diagonal(dim1=-2, dim2=-1).add_(fill[:, None])

    w = old.expand(batch, -1, -1)
    for _ in range(_SUBSPACE_ITERATIONS):
        p = orthonormalize(filled @ w)
        w = orthonormalize(filled.mT @ p)
    s = p.mT @ y @ w
    residual = (y @ w - p @ s).square().sum((-2, -1)).sqrt()
    # All singular values of S above the bound on sigma_{r+1}: then the converged subspace is the dominant one.
    smallest = 1 / torch.linalg.inv_ex(s).inverse.square().sum((-2, -1)).sqrt()
    certified = (residual <= _CONVERGED * norm) & (smallest > perturbation)
    rows = (~certified).nonzero().flatten()
    if rows.numel():
        left, _, right = torch.linalg.svd(filled[rows])
        p[rows], w[rows] = left[..., :rank], right[..., :rank, :].mT
        s[rows] = p[rows].mT @ y[rows] @ w[rows]
    return p, s, w
