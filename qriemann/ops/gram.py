"""First tall pass: the Gram matrices that the core needs."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def gram(z: Float[Tensor, "k t p"], rank: int) -> Float[Tensor, "k p q"]:
    """z^T [N, D], the inner products of all columns with those behind the first `rank`.

    The columns of U among themselves are left out: `apply` keeps them orthonormal to float32 rounding.

    Args:
        z: the sides of one tall dimension t, columns [U, N] or [U, N, D], p = 2 r or 3 r.
        rank: r.

    Returns:
        (k, p, p - r), in z's dtype. TF32 must be off: a Gram matrix squares the condition number.

    Cost: 2 p (p - r) t flops and one read of z a side.
    """
    return z.mT @ z[..., rank:]
