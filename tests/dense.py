"""Float64 truth for fixed-rank steps: X, G and M as m x n matrices, every decomposition by LAPACK.

Written from the formulas of arXiv 2507.12142 alone; shares no code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the leading singular subspaces."""
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    return left[:, :rank], right[:rank].mT


def best_approximation(x: Tensor, rank: int) -> Tensor:
    left, sigma, right = torch.linalg.svd(x, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


def tangent_projection(z: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Z - (I - U U^T) Z (I - V V^T)."""
    off_u = z - u @ (u.mT @ z)
    return z - (off_u - off_u @ v @ v.mT)


def polar(z: Tensor, rtol: float) -> Tensor:
    """Singular values to one, those under rtol times the largest to zero."""
    left, sigma, right = torch.linalg.svd(z, full_matrices=False)
    return (left * (sigma > rtol * sigma[0])) @ right


class DenseRiemannion:
    """X+ = truncate((1 - lr wd) X - lr P(polar(M))), with M transported by projection.

    Attributes:
        x, u, v: the point and orthonormal bases of its subspaces.
        m: momentum, a tangent vector at x.
    """

    def __init__(self, x: Tensor, u: Tensor, v: Tensor, rtol: float) -> None:
        self.x, self.u, self.v, self.rtol = x.double(), u.double(), v.double(), rtol
        self.m = torch.zeros_like(self.x)

    def step(
        self,
        grad: Tensor,
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
        *,
        tangent_iterations: int = 1,
        nesterov: bool = False,
        momentum_form: str = "raw",
    ) -> None:
        rank = self.u.shape[1]
        g = tangent_projection(grad.double(), self.u, self.v)
        self.m = momentum * self.m + g
        direction = g + momentum * self.m if nesterov else self.m
        for _ in range(tangent_iterations):
            if direction.any():
                direction = tangent_projection(polar(direction, self.rtol), self.u, self.v)
        y = (1 - lr * weight_decay) * self.x - lr * direction
        # The tangent space at a point of lower rank depends on which directions fill its bases up: the old ones, by the
        # limit of a vanishing multiple of U V^T.
        filling = 1e-9 * y.norm() if y.any() else 1.0
        self.x = best_approximation(y, rank)
        self.u, self.v = low_rank_factors(y + filling * self.u @ self.v.mT, rank)
        carried = self.m if momentum_form == "raw" else direction
        self.m = tangent_projection(carried, self.u, self.v)
