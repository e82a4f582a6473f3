"""Tangent vectors in explicit (C, A, B) form: the textbook side of what `ops.core` does inside Gram matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qriemann.geometry.point import FixedRankPoint


class FixedRankTangent(NamedTuple):
    """U C V^T + A V^T + U B^T at a point, with U^T A = 0 and V^T B = 0.

    Attributes:
        core: C, (r, r).
        u_perp: A, (m, r).
        v_perp: B, (n, r).
    """

    core: Float[Tensor, "*b r r"]
    u_perp: Float[Tensor, "*b m r"]
    v_perp: Float[Tensor, "*b n r"]

    def dense(self, point: FixedRankPoint) -> Float[Tensor, "*b m n"]:
        """The tangent vector as an m x n matrix."""
        return point.u @ self.core @ point.v.mT + self.u_perp @ point.v.mT + point.u @ self.v_perp.mT


def project(
    point: FixedRankPoint, grad_u: Float[Tensor, "*b m r"], grad_v: Float[Tensor, "*b n r"]
) -> FixedRankTangent:
    """Orthogonal projection of the ambient gradient G onto the tangent space at `point`.

    Args:
        point: X = U S V^T.
        grad_u: G V, as the layer's backward leaves it.
        grad_v: G^T U, likewise.

    Cost: O((m + n) r^2) a layer; G itself is never formed. [arXiv 2507.12142, Eq. (6)]
    """
    core = point.u.mT @ grad_u
    return FixedRankTangent(core, grad_u - point.u @ core, grad_v - point.v @ core.mT)


def inner(first: FixedRankTangent, second: FixedRankTangent) -> Float[Tensor, "*b"]:
    """The Euclidean inner product of two tangent vectors at the same point; U and V drop out of it."""
    return torch.stack([(x * y).sum((-2, -1)) for x, y in zip(first, second, strict=True)]).sum(0)
