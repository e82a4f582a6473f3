"""First tall pass: the Gram matrices that the core needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Longest sum that is left to the library: one that adds row after row loses 3.9e-6 of a float32 Gram matrix over 14,336 rows.
_ROWS = 1024


def inner(left: Float[Tensor, "k t p"], right: Float[Tensor, "k t q"]) -> Float[Tensor, "k p q"]:
    """left^T right, summed in blocks of rows."""
    rows = left.shape[-2]
    # As few equal blocks as there may be, so that all of them are views.
    count = next((n for n in range(-(-rows // _ROWS), rows // 64 + 1) if rows % n == 0), 1)
    if count == 1:
        return left.mT @ right
    return (left.unflatten(-2, (count, -1)).mT @ right.unflatten(-2, (count, -1))).sum(-3)


def gram(blocks: Sequence[Float[Tensor, "k t r"]]) -> Float[Tensor, "k p q"]:
    """[U, N, D]^T [N, D]: the inner products of all columns with those of N (and D).

    The columns of U among themselves are left out: `apply` keeps them orthonormal to float32 rounding.

    Args:
        blocks: U, N and, where the direction differs from the momentum, D; the sides of one height t.

    Returns:
        (k, p r, (p - 1) r) for p blocks, in their dtype. TF32 must be off: a Gram matrix squares the condition number.

    Cost: 2 p (p - 1) r^2 t flops and one read of each block a side.
    """
    columns = [torch.cat([inner(left, right) for left in blocks], -2) for right in blocks[1:]]
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)
