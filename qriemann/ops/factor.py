"""Orthonormal factors of tall matrices from their Gram matrices alone: Cholesky, with pivoting where it is unsafe."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Pivots of the column-scaled Gram matrix below this are dropped. The entries carry a float32 error of some 3e-7, so a
# direction kept at the threshold has its length wrong by about 1 %, which `apply` then corrects; below it is noise.
PIVOT_TOL = 2.5e-5


def factor_gram(
    gram: Float[Tensor, "*b r r"], scale: Float[Tensor, "*b r"]
) -> tuple[Float[Tensor, "*b r r"], Float[Tensor, "*b r r"], bool]:
    """R and its inverse with A = Q R, Q = A R^-1 orthonormal, from A^T A alone.

    Directions of A that are noise (see PIVOT_TOL) get a zero column of Q and a zero row of R: null directions are
    dropped, never invented.

    Args:
        gram: A^T A. May be indefinite by rounding.
        scale: lengths that the noise of each column is relative to (the column before it was projected).

    Returns:
        (R, R^-1), R^-1 a generalized inverse where directions were dropped, and whether none was: a flag read on the host.
    """
    # The outer product of two zeros must be no zero.
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny ** 0.5)
    scaled = gram / (scale[..., :, None] * scale[..., None, :])
    lower, info = torch.linalg.cholesky_ex(scaled)
    # Never true of a NaN.
    safe = (lower.diagonal(dim1=-2, dim2=-1).amin(-1) >= PIVOT_TOL**0.5) & (info == 0)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    r_factor, r_inverse = lower.mT, torch.linalg.solve_triangular(lower, eye, upper=False).mT
    complete = bool(safe.all())
    if not complete:
        unsafe = ~safe
        r_factor[unsafe], r_inverse[unsafe] = _pivoted(scaled[unsafe])
    return r_factor * scale[..., None, :], r_inverse / scale[..., :, None], complete


def _pivoted(gram: Float[Tensor, "*b r r"]) -> tuple[Float[Tensor, "*b r r"], Float[Tensor, "*b r r"]]:
    """Cholesky with diagonal pivoting that stops at PIVOT_TOL; cannot fail, whatever the input."""
    batch, rank, _ = gram.shape
    rows = torch.arange(batch, device=gram.device)
    rest = (gram + gram.mT) / 2
    r_factor, r_inverse = torch.zeros_like(rest), torch.zeros_like(rest)
    for step in range(rank):
        diagonal = rest.diagonal(dim1=-2, dim2=-1)
        pivot = diagonal.argmax(-1)
        value = diagonal[rows, pivot]
        keep = value > PIVOT_TOL
        root = torch.where(keep, value, 1).rsqrt() * keep
        row = rest[rows, pivot] * root[:, None]
        # Column `step` of R^-1: the unit vector of the pivot, less what the columns before hold of it.
        column = -(r_inverse @ r_factor[rows, :, pivot][..., None]).squeeze(-1)
        column[rows, pivot] += 1
        r_inverse[..., step] = column * root[:, None]
        r_factor[:, step] = row
        rest = rest - row[..., :, None] * row[..., None, :]
        rest[rows, pivot] = 0
        rest[rows, :, pivot] = 0
    return r_factor, r_inverse
