"""Points of the fixed-rank manifold and how to make them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class FixedRankPoint(NamedTuple):
    """X = U S V^T.

    Attributes:
        u: (m, r), orthonormal columns.
        s: (r, r).
        v: (n, r), orthonormal columns.
    """

    u: Float[Tensor, "*b m r"]
    s: Float[Tensor, "*b r r"]
    v: Float[Tensor, "*b n r"]

    def dense(self) -> Float[Tensor, "*b m n"]:
        """X as an m x n matrix, in float64; for tests, inspection and export."""
        return self.u.double() @ self.s.double() @ self.v.double().mT


def random_orthonormal(rows: int, rank: int, generator: torch.Generator) -> Float[Tensor, "t r"]:
    """A (rows, rank) float32 basis of a uniformly distributed subspace, drawn on the CPU.

    Args:
        rows: at least `rank`.
        generator: a CPU generator; the draw does not depend on the device the basis is used on.
    """
    return torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))[0].float()


def point_from_factors(b: Float[Tensor, "m r"], a: Float[Tensor, "r n"], generator: torch.Generator) -> FixedRankPoint:
    """The point X = B A, with S diagonal; rank-deficient and zero factors are ordinary.

    The product is factored in float64 and rounded once. Directions that X does not have are filled from the spans of B
    and A^T first and from random ones last, so that a fresh LoRA adapter (B = 0) keeps the subspace of its A.

    Args:
        b: lora_B.weight.
        a: lora_A.weight.
        generator: for the random directions.
    """
    rank, device = b.shape[1], b.device
    q_b, r_b = _orthonormal_basis(b.double().cpu(), generator)
    q_a, r_a = _orthonormal_basis(a.double().cpu().mT, generator)
    left, sigma, right = torch.linalg.svd(r_b @ r_a.mT)
    s = torch.zeros(rank, rank, dtype=torch.float64)
    s.diagonal().copy_(sigma)
    return FixedRankPoint((q_b @ left).float().to(device), s.float().to(device), (q_a @ right.mT).float().to(device))


def _orthonormal_basis(
    x: Float[Tensor, "t r"], generator: torch.Generator
) -> tuple[Float[Tensor, "t r"], Float[Tensor, "r r"]]:
    """Q, R with x = Q R, Q orthonormal whatever the rank of x."""
    left, sigma, _ = torch.linalg.svd(x, full_matrices=False)
    kept = int((sigma > 1e-12 * sigma[0]).sum()) if sigma.numel() and sigma[0] > 0 else 0
    if kept < x.shape[1]:
        filling = torch.randn(x.shape[0], x.shape[1] - kept, generator=generator, dtype=torch.float64)
        q = torch.linalg.qr(torch.cat([left[:, :kept], filling], 1))[0]
    else:
        q = left
    return q, q.mT @ x
