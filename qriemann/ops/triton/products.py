"""Matrix arithmetic inside one program, on matrices in global scratch: the words `core` and `finish` are written in.

Every matrix is row-major float32 with its sizes padded to multiples of 16; the padding is zero and all of these functions
keep it so. Each function ends with a barrier: what it wrote, the next one may read. Outputs must not overlap inputs, apart
from the `c` of `multiply` and the first operand of `combine`, which may be the output.

Why global scratch and not registers: one code then serves ranks 16 to 128 (a 256 x 256 float32 matrix is the register
file of a whole multiprocessor), and a matrix of rank 16, 4 KiB, never leaves the first-level cache.
"""

# ruff: noqa: N803, N806 - constexpr arguments are spelled as constants, as Triton's own are.
from __future__ import annotations

import triton
import triton.language as tl

# Edge of the tiles and depth of a product's inner block. A thread of a non-tensor-core product holds its operands for the
# whole depth in registers: more than 32 spills.
_TILE = tl.constexpr(64)
_DEPTH = tl.constexpr(32)


@triton.jit
def multiply(
    out,
    a,
    b,
    c,
    alpha,
    beta,
    M,
    N: tl.constexpr,
    K,
    OUT_STRIDE: tl.constexpr,
    A_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    TILE_M: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = alpha op(a) op(b), plus beta c where ADD; op(a) is (M, K), op(b) (K, N), c laid out as out."""
    TILE_N: tl.constexpr = min(N, _TILE)
    for row in range(0, M, TILE_M):
        rows = row + tl.arange(0, TILE_M)
        for column in range(0, N, TILE_N):
            columns = column + tl.arange(0, TILE_N)
            total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
            for depth in range(0, K, DEPTH):
                inner = depth + tl.arange(0, DEPTH)
                # Read as stored, so that neighbouring threads read neighbouring addresses, then turned.
                if A_TRANSPOSED:
                    left = tl.trans(tl.load(a + inner[:, None] * A_STRIDE + rows[None, :]))
                else:
                    left = tl.load(a + rows[:, None] * A_STRIDE + inner[None, :])
                if B_TRANSPOSED:
                    right = tl.trans(tl.load(b + columns[:, None] * B_STRIDE + inner[None, :]))
                else:
                    right = tl.load(b + inner[:, None] * B_STRIDE + columns[None, :])
                total = tl.dot(left, right, total, input_precision="ieee")
            place = rows[:, None] * OUT_STRIDE + columns[None, :]
            total = alpha * total
            if ADD:
                total += beta * tl.load(c + place)
            tl.store(out + place, total)
    tl.debug_barrier()


@triton.jit
def multiply_square(
    out,
    a,
    b,
    c,
    alpha,
    beta,
    SIZE: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`multiply` of contiguous (SIZE, SIZE) matrices."""
    TILE: tl.constexpr = min(SIZE, _TILE)
    multiply(
        out, a, b, c, alpha, beta,
        SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, A_TRANSPOSED, B_TRANSPOSED, ADD, TILE, DEPTH,
    )  # fmt: skip


@triton.jit
def combine(
    out,
    a,
    b,
    alpha,
    beta,
    M: tl.constexpr,
    N: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    A_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
):
    """out = alpha a + beta op(b)."""
    TILE_M: tl.constexpr = min(M, _TILE)
    TILE_N: tl.constexpr = min(N, _TILE)
    for row in range(0, M, TILE_M):
        rows = row + tl.arange(0, TILE_M)
        for column in range(0, N, TILE_N):
            columns = column + tl.arange(0, TILE_N)
            first = tl.load(a + rows[:, None] * A_STRIDE + columns[None, :])
            if B_TRANSPOSED:
                second = tl.trans(tl.load(b + columns[:, None] * B_STRIDE + rows[None, :]))
            else:
                second = tl.load(b + rows[:, None] * B_STRIDE + columns[None, :])
            tl.store(out + rows[:, None] * OUT_STRIDE + columns[None, :], alpha * first + beta * second)
    tl.debug_barrier()


@triton.jit
def copy(
    out,
    a,
    scale,
    M: tl.constexpr,
    N: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    A_STRIDE: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
):
    """out = scale op(a); `out` may be `a` where it is not transposed."""
    TILE_M: tl.constexpr = min(M, _TILE)
    TILE_N: tl.constexpr = min(N, _TILE)
    for row in range(0, M, TILE_M):
        rows = row + tl.arange(0, TILE_M)
        for column in range(0, N, TILE_N):
            columns = column + tl.arange(0, TILE_N)
            if A_TRANSPOSED:
                value = tl.trans(tl.load(a + columns[:, None] * A_STRIDE + rows[None, :]))
            else:
                value = tl.load(a + rows[:, None] * A_STRIDE + columns[None, :])
            tl.store(out + rows[:, None] * OUT_STRIDE + columns[None, :], scale * value)
    tl.debug_barrier()


@triton.jit
def clear(out, M: tl.constexpr, N: tl.constexpr, OUT_STRIDE: tl.constexpr, DIAGONAL):
    """out = 0, with ones on the first DIAGONAL places of the diagonal."""
    TILE_M: tl.constexpr = min(M, _TILE)
    TILE_N: tl.constexpr = min(N, _TILE)
    for row in range(0, M, TILE_M):
        rows = row + tl.arange(0, TILE_M)
        for column in range(0, N, TILE_N):
            columns = column + tl.arange(0, TILE_N)
            one = (rows[:, None] == columns[None, :]) & (rows[:, None] < DIAGONAL)
            tl.store(out + rows[:, None] * OUT_STRIDE + columns[None, :], one.to(tl.float32))
    tl.debug_barrier()


@triton.jit
def measure(a, M: tl.constexpr, N: tl.constexpr, A_STRIDE: tl.constexpr):
    """(sum of squares, largest absolute value, number of entries that are not finite) of a."""
    TILE_M: tl.constexpr = min(M, _TILE)
    TILE_N: tl.constexpr = min(N, _TILE)
    squares = 0.0
    largest = 0.0
    broken = 0
    for row in range(0, M, TILE_M):
        rows = row + tl.arange(0, TILE_M)
        for column in range(0, N, TILE_N):
            columns = column + tl.arange(0, TILE_N)
            value = tl.load(a + rows[:, None] * A_STRIDE + columns[None, :])
            squares += tl.sum(tl.sum(value * value, axis=1), axis=0)
            largest = tl.maximum(largest, tl.max(tl.max(tl.abs(value), axis=1), axis=0))
            finite = tl.abs(value) <= 3.4028234e38
            broken += tl.sum(tl.sum(tl.where(finite, 0, 1), axis=1), axis=0)
    tl.debug_barrier()
    return squares, largest, broken


@triton.jit
def trace(a, N: tl.constexpr, A_STRIDE: tl.constexpr):
    """The sum of the diagonal of the (N, N) matrix a."""
    index = tl.arange(0, N)
    total = tl.sum(tl.load(a + index * (A_STRIDE + 1)), axis=0)
    tl.debug_barrier()
    return total
