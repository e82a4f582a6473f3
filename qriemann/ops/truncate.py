"""The best rank-r approximation of a 2r x 2r matrix that is known to have rank-r dominant structure."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qriemann.ops.svd import svd

# Singular values under this fraction of the norm count as missing: a cold start with a gradient of low rank. Float32 leaves
# about 1e-6 where the exact y has zeros.
_MISSING = 1e-5
# How far U and V may be from the dominant subspaces, relative to y: what float32 factors can hold.
_CONVERGED = 1e-7


def truncate(
    y: Float[Tensor, "b p p"], perturbation: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "2 b p r"], Float[Tensor, "b r r"]]:
    """(P, W) stacked and S, with P S W^T the best rank-r approximation of y, P and W orthonormal.

    Three half-rounds of subspace iteration from the old factors. With rho = perturbation / sigma_r(y) they leave an error
    of rho^5: on a flat stretch of the manifold that is exact. A certificate decides whether it was; what is not certified
    goes to an SVD.

    Args:
        y: float64, in the bases [U, Q_A], [V, Q_B].
        perturbation: a bound on sigma_{r+1}(y).
    """
    rank = y.shape[-1] // 2
    norm = y.square().sum((-2, -1)).sqrt()
    p, _ = _orthonormalize(y[..., :rank].contiguous())
    w, _ = _orthonormalize(y.mT @ p)
    p, s = _orthonormalize(y @ w)
    residual = torch.baddbmm(y.mT @ p, w, s.mT, alpha=-1).square().sum((-2, -1)).sqrt()
    # All singular values of S above the bound on sigma_{r+1}: then the converged subspace is the dominant one.
    smallest = 1 / _inverse_norm(s)
    # not (<=) so that a NaN, from a singular y, is uncertified.
    rows = (~((residual <= _CONVERGED * norm) & (smallest > perturbation))).nonzero().flatten()
    if rows.numel():
        p[rows], s[rows], w[rows] = _by_svd(y[rows], torch.where(norm > 0, norm, 1)[rows])
    return torch.stack([p, w]), s


def _orthonormalize(y: Float[Tensor, "b p r"]) -> tuple[Float[Tensor, "b p r"], Float[Tensor, "b r r"]]:
    """Q, R with y = Q R by Cholesky; NaN where the columns are dependent."""
    # The columns of a graded y differ in length, not much in direction: scaled, their Gram matrix is well conditioned.
    length = y.square().sum(-2, keepdim=True).sqrt()
    y = y / length
    lower, info = torch.linalg.cholesky_ex(y.mT @ y)
    lower = torch.where((info == 0)[:, None, None], lower, torch.nan)
    q = torch.linalg.solve_triangular(lower.mT, y, upper=True, left=False)
    return q, lower.mT * length


def _inverse_norm(r_factor: Float[Tensor, "b r r"]) -> Float[Tensor, " b"]:
    """||R^-1||_F of upper triangular matrices."""
    eye = torch.eye(r_factor.shape[-1], dtype=r_factor.dtype, device=r_factor.device).expand_as(r_factor)
    return torch.linalg.solve_triangular(r_factor, eye, upper=True).square().sum((-2, -1)).sqrt()


def _by_svd(
    y: Float[Tensor, "b p p"], norm: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b p r"], Float[Tensor, "b r r"], Float[Tensor, "b p r"]]:
    rank = y.shape[-1] // 2
    p, sigma, w = _leading(y, rank)
    missing = sigma <= _MISSING * norm[:, None]
    rows = missing.any(-1).nonzero().flatten()
    if rows.numel():
        # The old factors fill the missing directions. A QR, or the null vectors of this SVD, would invent columns that
        # exist in neither basis.
        kept = (~missing[rows]).to(y.dtype)[:, None]
        p_kept, w_kept = p[rows] * kept, w[rows] * kept
        filling = torch.zeros_like(y[rows])
        filling[:, :rank, :rank] = torch.eye(rank, dtype=y.dtype, device=y.device)
        filling = filling - p_kept @ (p_kept.mT @ filling)
        filling = filling - (filling @ w_kept) @ w_kept.mT
        # Columns of the kept part first (singular value 2), those of the filling next (at most 1).
        p[rows], _, w[rows] = _leading(2 * p_kept @ w_kept.mT + filling, rank)
    return p, p.mT @ y @ w, w


def _leading(
    y: Float[Tensor, "b p p"], rank: int
) -> tuple[Float[Tensor, "b p r"], Float[Tensor, "b r"], Float[Tensor, "b p r"]]:
    left, sigma, right = svd(y)
    return left[..., :rank], sigma[..., :rank], right[..., :rank, :].mT.clone()
