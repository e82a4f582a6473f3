"""The best rank-r approximation of a 2r x 2r matrix that is known to have rank-r dominant structure, by products alone."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vector_norm

from qriemann.ops.polar import polar

# Singular values under this fraction of the norm count as missing: a cold start with a gradient of low rank. Float32 leaves
# about 1e-6 where the exact y has zeros.
_MISSING = 1e-5
# How far U and V may be from the dominant subspaces, relative to y: what float32 factors can hold.
_CONVERGED = 1e-7
# Two settle steps that are small beside S. Six more settle all but the first two of a run that starts at S = 0, at a fifth of
# what purification costs.
_ROUNDS, _MORE_ROUNDS = 2, 6
# Each product doubles the distance of the squared singular values about the cut; the last dozen make the projector exact.
_PRODUCTS = 48
# Breaks exact ties in favour of the old factors.
_VANISHING = 1e-9


def truncate(y: Float[Tensor, "b p p"]) -> tuple[Float[Tensor, "2 b p r"], Float[Tensor, "b r r"]]:
    """(P, W) stacked and S, with P S W^T the best rank-r approximation of y, P and W orthonormal.

    Subspace iteration from the old factors. With rho = sigma_{r+1}(y) / sigma_r(y), five half-rounds leave an error of
    rho^9: on a flat stretch of the manifold that is exact. A certificate decides whether it was; what is not certified goes
    through more rounds, and what is not certified then, such as all of the first step from zero, is purified.

    Args:
        y: float64, in the bases [U, Q_A], [V, Q_B].
    """
    rank = y.shape[-1] // 2
    # A zero y (S = 0 and a rate that warms up from zero) keeps the old factors.
    norm = vector_norm(y, dim=(-2, -1), keepdim=True)
    y = y / norm.clamp_min(torch.finfo(y.dtype).tiny)
    y.diagonal(dim1=-2, dim2=-1)[:, :rank].add_(norm[:, 0] == 0)
    p, s, w, certified = _iterated(y, _orthonormalize(y[..., :rank])[0], _ROUNDS)
    rows = (~certified).nonzero().flatten()
    if rows.numel():
        p[rows], s[rows], w[rows], certified = _iterated(y[rows], p[rows], _MORE_ROUNDS)
        rows = rows[~certified]
        if rows.numel():
            p[rows], s[rows], w[rows] = _purified(y[rows])
    return torch.stack([p, w]), s * norm


def _iterated(
    y: Float[Tensor, "b p p"], p: Float[Tensor, "b p r"], rounds: int
) -> tuple[Float[Tensor, "b p r"], Float[Tensor, "b r r"], Float[Tensor, "b p r"], Bool[Tensor, " b"]]:
    """P, S, W after so many rounds of subspace iteration on y of norm one, and whether they are the dominant subspaces."""
    for _ in range(rounds):
        w, *_ = _orthonormalize(y.mT @ p)
        p, lower, length = _orthonormalize(y @ w)
    s = lower.mT * length
    residual = vector_norm(torch.baddbmm(y.mT @ p, w, s.mT, alpha=-1), dim=(-2, -1))
    # All singular values of S above all others of y: then the converged subspace is the dominant one.
    rest = _largest(torch.baddbmm(y, p @ s, w.mT, alpha=-1))
    # A NaN, from a singular y, is not certified.
    return p, s, w, (residual <= _CONVERGED) & (_smallest(s) > rest.clamp_min(_MISSING))


def _purified(
    y: Float[Tensor, "b p p"],
) -> tuple[Float[Tensor, "b p r"], Float[Tensor, "b r r"], Float[Tensor, "b p r"]]:
    """P, S, W whatever the gap after the r-th singular value; the old factors fill directions that y has not."""
    p, s, w = _dominant(y)
    rows = (~(_smallest(s) > _MISSING)).nonzero().flatten()
    if rows.numel():
        # A QR, or null vectors, would invent columns that exist in neither basis.
        kept = polar(y[rows], _MISSING)
        filling = _old(kept)
        filling = filling - kept @ (kept.mT @ filling)
        filling = filling - (filling @ kept.mT) @ kept
        # Columns of the kept part first (singular value 2), those of the filling next (at most 1).
        p[rows], _, w[rows] = _dominant(2 * kept + filling)
        # Where even these are too few, the step is taken inside the old factors.
        found = (p.isfinite() & w.isfinite()).all(-1).all(-1)[:, None, None]
        old = _old(y)[..., : p.shape[-1]]
        p, w = torch.where(found, p, old), torch.where(found, w, old)
        s = p.mT @ y @ w
    return p, s, w


def _dominant(
    y: Float[Tensor, "b p p"],
) -> tuple[Float[Tensor, "b p r"], Float[Tensor, "b r r"], Float[Tensor, "b p r"]]:
    """P, S, W of the r largest singular values; NaN where there are fewer.

    H = Y^T Y becomes the projector on the dominant right subspace by whichever of H^2 and 2 H - H^2 moves its trace
    towards r. [Niklasson, Phys. Rev. B 66, 155115 (2002)]
    """
    rank = y.shape[-1] // 2
    old = _old(y)
    h = y / vector_norm(y, dim=(-2, -1), keepdim=True) + _VANISHING * old
    h = h.mT @ h
    squared, doubled = h.new_zeros(()), h.new_full((), 2)
    for _ in range(_PRODUCTS):
        grows = h.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] < rank
        h = torch.lerp(h @ h, h, torch.where(grows, doubled, squared))
    # What is not decided yet ties within rounding: any of it will do beside all that was decided.
    h = h @ h
    h = h @ h
    # A dominant direction may be orthogonal to all old ones, but hardly to their sums with the new ones.
    w, *_ = _orthonormalize(h[..., :rank] + 0.1 * h[..., rank:])
    w, *_ = _orthonormalize(h @ w)
    # Twice: the columns of w mix singular values of any size.
    p, first, length = _orthonormalize(y @ w)
    p, second, mixed = _orthonormalize(p)
    return p, (second.mT * mixed) @ (first.mT * length), w


def _old(y: Float[Tensor, "b p p"]) -> Float[Tensor, "b p p"]:
    """U V^T in the bases of y."""
    old = torch.zeros_like(y)
    old.diagonal(dim1=-2, dim2=-1)[:, : y.shape[-1] // 2] = 1
    return old


def _orthonormalize(
    y: Float[Tensor, "b p r"],
) -> tuple[Float[Tensor, "b p r"], Float[Tensor, "b r r"], Float[Tensor, "b 1 r"]]:
    """Q, L, l with y = Q L^T diag(l) by Cholesky; NaN where the columns are dependent."""
    # The columns of a graded y differ in length, not much in direction: scaled, their Gram matrix is well conditioned.
    length = vector_norm(y, dim=-2, keepdim=True)
    y = y / length
    lower, info = torch.linalg.cholesky_ex(y.mT @ y)
    lower = torch.where((info == 0)[:, None, None], lower, torch.nan)
    return torch.linalg.solve_triangular(lower.mT, y, upper=True, left=False), lower, length


def _smallest(r_factor: Float[Tensor, "b r r"]) -> Float[Tensor, " b"]:
    """A lower bound on the smallest singular value of upper triangular matrices, within a factor r^(1/8)."""
    eye = torch.eye(r_factor.shape[-1], dtype=r_factor.dtype, device=r_factor.device).expand_as(r_factor)
    return _largest(torch.linalg.solve_triangular(r_factor, eye, upper=True)).reciprocal()


def _largest(x: Float[Tensor, "b p q"]) -> Float[Tensor, " b"]:
    """(trace (X^T X)^4)^(1/8), an upper bound on the largest singular value, within a factor q^(1/8)."""
    square = x.mT @ x
    return vector_norm(square @ square, dim=(-2, -1)) ** 0.25
