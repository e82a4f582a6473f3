"""The best rank-r approximation of a 2r x 2r matrix inside one program, by matrix products and Gram-Schmidt alone.

Three half-rounds of subspace iteration from the old factors settle a flat stretch of the manifold, as in
qriemann.ops.truncate. What a certificate does not pass goes on: by more rounds while they gain a digit each, else by
spectral purification. That is needed where the singular values of y come without a gap after the r-th, above all at S = 0:
there subspace iteration stands 4e-2 above the optimal distance after two rounds and 5e-4 after 32, purification 1e-4 after
20 to 24 products.
"""

# ruff: noqa: N803, N806 - constexpr arguments are spelled as constants, as Triton's own are.
from __future__ import annotations

import triton
import triton.language as tl

from qriemann.ops.triton.factor import orthonormalize
from qriemann.ops.triton.products import clear, combine, copy, measure, multiply, multiply_square, trace

# Relative to ||y||_F. The residual ||Y^T P - W S^T||_F of converged float32 subspaces is 2e-7 to 4e-7; this much of the
# step's error is still under what float32 factors hold.
CONVERGED = tl.constexpr(1e-6)
# A Gram-Schmidt column with less of ||y||_F left is rounding noise.
NULL = tl.constexpr(1e-6)
# Each gains a digit of the residual or is the last.
MAX_ROUNDS = tl.constexpr(8)
# 1.5^24 lifts singular values from 6e-5 of the largest to order one; smaller ones grow on during purification.
MAX_LIFTS = tl.constexpr(24)
MAX_PURIFICATIONS = tl.constexpr(32)
# trace(H - H^2): how far the projector H is from idempotent. Purification doubles rounding errors, so it must end.
PURE = tl.constexpr(1e-2)


@triton.jit
def truncate(
    p, w, s, y, y_transposed, work, panel_scratch, RANK: tl.constexpr, PADDED: tl.constexpr, DEPTH: tl.constexpr
):
    """P, S, W with P S W^T the best rank-r approximation of y, P and W orthonormal.

    Args:
        p, w: (2 PADDED, PADDED), s: (PADDED, PADDED); all overwritten.
        y: (2 PADDED, 2 PADDED), of a norm near one; `y_transposed` too.
        work: room for three matrices like y.
        panel_scratch: (PADDED, 16).
    """
    TALL: tl.constexpr = 2 * PADDED
    TILE: tl.constexpr = min(TALL, 64)
    SQUARE: tl.constexpr = TALL * TALL
    # The tall blocks lie where purification, which ends before they are next written, keeps a matrix.
    projector, column_block, residual_block = work, work + 2 * SQUARE, work + 2 * SQUARE + TALL * PADDED
    squares, _, _ = measure(y, TALL, TALL, TALL)
    norm = tl.sqrt_rn(squares)
    norm = tl.where(norm > 0, norm, 1.0)
    clear(w, TALL, PADDED, PADDED, RANK)

    # Half-rounds: 0 and 2 are P = orth(Y W), 1 is W = orth(Y^T P); 3 and 4 are W = orth(H W), H the purified projector on
    # the dominant right space, and 5 is P = orth(Y W) for the last time. One call of each operation serves all.
    half = 0
    rounds = 0
    residual = 1e30
    while half < 6:
        source = y
        factor = w
        target = p
        if half == 1:
            source = y_transposed
            factor = p
            target = w
        if (half == 3) | (half == 4):
            source = projector
            target = w
        multiply(
            column_block, source, factor, y, 1.0, 0.0,
            TALL, PADDED, TALL, PADDED, TALL, PADDED, False, False, False, TILE, DEPTH,
        )  # fmt: skip
        floor = norm * NULL
        if (half == 3) | (half == 4):
            floor = tl.full((), NULL, tl.float32)
        orthonormalize(target, column_block, panel_scratch, floor, RANK, PADDED, DEPTH)
        half += 1
        if (half == 3) | (half == 6):
            # column_block is Y W still.
            multiply(
                s, p, column_block, y, 1.0, 0.0,
                PADDED, PADDED, TALL, PADDED, PADDED, PADDED, True, False, False, min(PADDED, 64), DEPTH,
            )  # fmt: skip
        if half == 3:
            multiply(
                residual_block, y_transposed, p, y, 1.0, 0.0,
                TALL, PADDED, TALL, PADDED, TALL, PADDED, False, False, False, TILE, DEPTH,
            )  # fmt: skip
            multiply(
                residual_block, w, s, residual_block, -1.0, 1.0,
                TALL, PADDED, PADDED, PADDED, PADDED, PADDED, False, True, True, TILE, DEPTH,
            )  # fmt: skip
            squares, _, _ = measure(residual_block, TALL, PADDED, PADDED)
            previous = residual
            residual = tl.sqrt_rn(squares)
            rounds += 1
            if residual <= norm * CONVERGED:
                half = 6
            else:
                if (residual < 0.1 * previous) & (rounds < MAX_ROUNDS):
                    half = 1
                else:
                    _purify(projector, y, work, norm, RANK, PADDED, DEPTH)


@triton.jit
def _purify(projector, y, work, norm, RANK: tl.constexpr, PADDED: tl.constexpr, DEPTH: tl.constexpr):
    """projector, the first matrix of `work`: nearly the orthogonal projector on the r leading right singular vectors of y.

    Lifts the singular values towards one with order kept (x <- 1.5 x - 0.5 x^3) until their squares sum to r, then applies
    to H = X^T X whichever of H^2 and 2 H - H^2 moves its trace towards r. [Niklasson, Phys. Rev. B 66, 155115 (2002)]
    Singular values that nearly tie with the r-th may stay between 0 and 1: which of them is taken hardly matters.
    """
    TALL: tl.constexpr = 2 * PADDED
    SQUARE: tl.constexpr = TALL * TALL
    h, x, x_other = work, work + SQUARE, work + 2 * SQUARE
    copy(x, y, 1.0 / norm, TALL, TALL, TALL, TALL, False)
    lifts = 0
    held = 0.0
    while (held < RANK) & (lifts <= MAX_LIFTS):
        if lifts > 0:
            multiply_square(x_other, x, h, x, -0.5, 1.5, TALL, False, False, True, DEPTH)
            copy(x, x_other, 1.0, TALL, TALL, TALL, TALL, False)
        multiply_square(h, x, x, x, 1.0, 0.0, TALL, True, False, False, DEPTH)
        held = trace(h, TALL, TALL)
        lifts += 1
    purifications = 0
    impure = 1.0
    while (impure > PURE) & (purifications < MAX_PURIFICATIONS):
        multiply_square(x, h, h, h, 1.0, 0.0, TALL, False, False, False, DEPTH)
        held = trace(h, TALL, TALL)
        impure = held - trace(x, TALL, TALL)
        if held > RANK:
            copy(h, x, 1.0, TALL, TALL, TALL, TALL, False)
        else:
            combine(h, h, x, 2.0, -1.0, TALL, TALL, TALL, TALL, TALL, False)
        purifications += 1
