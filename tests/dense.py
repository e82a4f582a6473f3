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


def shares_kept(bases: dict[str, tuple[Tensor, Tensor]], gradients: dict[str, Tensor], rank: int) -> dict[str, float]:
    """How much of the norm of the best approximation of `rank` the tangent space holds, layer by layer."""
    shares = {}
    for name, (u, v) in bases.items():
        kept = tangent_projection(gradients[name], u.double(), v.double()).norm()
        shares[name] = (kept / best_approximation(gradients[name], rank).norm()).item()
    return shares


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


class DenseRiemannLoRA:
    """X+ = truncate((1 - lr wd) X - lr (a_0 A V^T + a_1 U B^T)), A and B the two blocks of the averaged gradient M.

    M <- momentum P(M) + (1 - momentum) P(G), A = (I - U U^T) M V, B = M^T U. `simulate_adam` divides each block by the root
    of an average of the squared norms of the gradient's blocks, with Adam's correction of both averages; else a_i = 1. A
    gradient's A under rtol times G V counts as zero; 0 leaves no cut-off.
    """

    def __init__(self, x: Tensor, u: Tensor, v: Tensor, rtol: float) -> None:
        self.x, self.u, self.v, self.rtol = x.double(), u.double(), v.double(), rtol
        self.m = torch.zeros_like(self.x)
        self.square_norms, self.steps = [0.0, 0.0], 0

    def blocks(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z_v = z @ self.v
        return z_v - self.u @ (self.u.mT @ z_v), z.mT @ self.u

    def step(
        self,
        grad: Tensor,
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
        *,
        simulate_adam: bool,
        beta2: float = 0.999,
        norm_eps: float = 1e-8,
    ) -> None:
        g = tangent_projection(grad.double(), self.u, self.v)
        self.m = momentum * self.m + (1 - momentum) * g
        self.steps += 1
        a, b = self.blocks(self.m)
        if simulate_adam:
            norms = [block.square().sum().item() for block in self.blocks(g)]
            if norms[0] <= self.rtol**2 * (g @ self.v).square().sum().item():
                norms[0] = 0.0
            self.square_norms = [
                beta2 * old + (1 - beta2) * new for old, new in zip(self.square_norms, norms, strict=True)
            ]
            first, second = 1 - momentum**self.steps, 1 - beta2**self.steps
            a, b = (
                block / first / ((average / second) ** 0.5 + norm_eps) if average else 0 * block
                for block, average in zip((a, b), self.square_norms, strict=True)
            )
        y = (1 - lr * weight_decay) * self.x - lr * (a @ self.v.mT + self.u @ b.mT)
        rank = self.u.shape[1]
        self.x = best_approximation(y, rank)
        self.u, self.v = low_rank_factors(y, rank)
        self.m = tangent_projection(self.m, self.u, self.v)
