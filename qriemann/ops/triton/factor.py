"""Orthonormal bases inside one program: from a Gram matrix by pivoted Cholesky, from columns by Gram-Schmidt.

Neither can fail. Directions that are noise are dropped by the first and replaced by the second; NaN cannot arise from
finite input.
"""

# ruff: noqa: N803, N806 - constexpr arguments are spelled as constants, as Triton's own are.
from __future__ import annotations

import triton
import triton.language as tl

from qriemann.ops.triton.products import multiply

# Columns that Gram-Schmidt holds in registers at a time; the panels among each other go through matrix products.
PANEL = tl.constexpr(16)


@triton.jit
def factor_gram(r_factor, r_inverse, gram, length, tolerance, RANK: tl.constexpr, PADDED: tl.constexpr):
    """R and R^-1 with A = Q R and Q = A R^-1 orthonormal, from gram = A^T A; see qriemann.ops.factor.

    Cholesky with diagonal pivoting of the column-scaled matrix, applied to [gram, I] at once: the right half becomes the
    transpose of R^-1. Stops at the first pivot under the tolerance; R's rows and R^-1's columns from there on are zero.

    Args:
        length: what the noise of each column of A is relative to; (PADDED,), zeros are taken as one.
    """
    index = tl.arange(0, PADDED)
    place = index[:, None] * PADDED + index[None, :]
    diagonal_only = index[:, None] == index[None, :]
    scale = tl.load(length + index)
    scale = tl.where(scale > 0, scale, 1.0)
    rest = tl.load(gram + place) / tl.expand_dims(scale, 1) / tl.expand_dims(scale, 0)
    inverse = tl.where(diagonal_only, 1.0, 0.0)
    tl.store(r_factor + place, tl.zeros((PADDED, PADDED), dtype=tl.float32))
    tl.store(r_inverse + place, tl.zeros((PADDED, PADDED), dtype=tl.float32))
    tl.debug_barrier()

    # -1 marks the columns that are done and the padding.
    diagonal = tl.where(index < RANK, tl.sum(tl.where(diagonal_only, rest, 0.0), axis=0), -1.0)
    step = 0
    value = tl.max(diagonal, axis=0)
    while (step < RANK) & (value > tolerance):
        pivot = tl.argmax(diagonal, axis=0)
        root = 1.0 / tl.sqrt_rn(value)
        on_pivot = index == pivot
        left = diagonal != -1.0
        # Twice the same numbers, once along each axis: rest is symmetric.
        row = tl.where(left, tl.sum(tl.where(on_pivot[:, None], rest, 0.0), axis=0) * root, 0.0)
        column = tl.where(left, tl.sum(tl.where(on_pivot[None, :], rest, 0.0), axis=1) * root, 0.0)
        inverse_row = tl.sum(tl.where(on_pivot[:, None], inverse, 0.0), axis=0) * root
        tl.store(r_factor + step * PADDED + index, row * scale)
        tl.store(r_inverse + index * PADDED + step, inverse_row / scale)
        rest -= column[:, None] * row[None, :]
        inverse -= column[:, None] * inverse_row[None, :]
        diagonal = tl.where(left & (index != pivot), tl.maximum(diagonal - row * row, 0.0), -1.0)
        step += 1
        value = tl.max(diagonal, axis=0)
    tl.debug_barrier()


@triton.jit
def orthonormalize(q, a, scratch, floor, RANK: tl.constexpr, PADDED: tl.constexpr, DEPTH: tl.constexpr):
    """q: an orthonormal basis that holds the span of a's columns, (2 PADDED, PADDED) both.

    Gram-Schmidt, every projection done twice. A column with less than `floor` left is noise, and gives way to what the
    columns so far do not hold of the old factor: of the first RANK coordinates. All else of q stays where a has zeros.

    Args:
        scratch: (PADDED, PANEL).
    """
    TALL: tl.constexpr = 2 * PADDED
    rows = tl.arange(0, TALL)
    columns = tl.arange(0, PANEL)
    place = rows[:, None] * PADDED + columns[None, :]
    for first in range(0, PADDED, PANEL):
        tl.store(q + first + place, tl.load(a + first + place))
        tl.debug_barrier()
        least = floor
        # The second sweep mends what cancellation inside the panel undid against the panels before it.
        sweeps = tl.where(first > 0, 2, 1)
        for _ in range(sweeps):
            if first > 0:
                for _ in range(2):
                    multiply(
                        scratch, q, q + first, q, 1.0, 0.0,
                        first, PANEL, TALL, PANEL, PADDED, PADDED, True, False, False, PANEL, DEPTH,
                    )  # fmt: skip
                    multiply(
                        q + first, q, scratch, q + first, -1.0, 1.0,
                        TALL, PANEL, first, PADDED, PADDED, PANEL, False, False, True, min(TALL, 64), PANEL,
                    )  # fmt: skip
            panel = tl.load(q + first + place)
            for j in range(tl.minimum(RANK - first, PANEL)):
                column = tl.sum(tl.where(columns[None, :] == j, panel, 0.0), axis=1)
                for _ in range(2):
                    held = tl.where(columns < j, tl.sum(panel * column[:, None], axis=0), 0.0)
                    column -= tl.sum(panel * held[None, :], axis=1)
                norm = tl.sqrt_rn(tl.sum(column * column, axis=0))
                # not (>) so that nothing but a sound column passes.
                if not (norm > least):
                    column = _missing_direction(q, first, panel, j, RANK, PADDED)
                    norm = tl.sqrt_rn(tl.sum(column * column, axis=0))
                column = column / norm
                panel = tl.where(columns[None, :] == j, column[:, None], panel)
            tl.store(q + first + place, panel)
            tl.debug_barrier()
            # Unit columns now: one that loses this much again was parallel to the panels before.
            least = 0.1


@triton.jit
def _missing_direction(q, first, panel, j, RANK: tl.constexpr, PADDED: tl.constexpr):
    """What the columns so far leave of the old factor's coordinate that they hold least of: at least 1/sqrt(RANK) long."""
    TALL: tl.constexpr = 2 * PADDED
    rows = tl.arange(0, TALL)
    columns = tl.arange(0, PANEL)
    place = rows[:, None] * PADDED + columns[None, :]
    done = tl.where(columns[None, :] < j, panel, 0.0)
    held = tl.sum(done * done, axis=1)
    for before in range(0, first, PANEL):
        earlier = tl.load(q + before + place)
        held += tl.sum(earlier * earlier, axis=1)
    chosen = tl.argmin(tl.where(rows < RANK, held, 1e30), axis=0)
    column = tl.where(rows == chosen, 1.0, 0.0)
    for _ in range(3):
        for before in range(0, first, PANEL):
            earlier = tl.load(q + before + place)
            column -= tl.sum(earlier * tl.sum(earlier * column[:, None], axis=0)[None, :], axis=1)
        column -= tl.sum(done * tl.sum(done * column[:, None], axis=0)[None, :], axis=1)
    return column
