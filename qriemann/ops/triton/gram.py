"""First tall pass: U^T N and N^T N of every side, N = beta m + g formed on the way from memory to the product."""

# ruff: noqa: N803, N806 - constexpr arguments are spelled as constants, as Triton's own are.
from __future__ import annotations

import triton
import triton.language as tl

from qriemann.ops.triton.sides import (
    COLUMN_STRIDE,
    FACTOR,
    FIELDS,
    GRADIENT,
    HEIGHT,
    MOMENTUM,
    ROW_STRIDE,
    address,
    load_block,
    load_gradient,
)


@triton.jit
def gram_kernel(
    table,
    tiles,
    decay,
    partials,
    layers,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """Partial sums of one chunk of rows of one side; `core` adds the chunks up in order.

    Blocks of `partials`, (PADDED, PADDED) each: U^T N, N^T N; with NESTEROV, where D = beta N + g is the direction:
    U^T N, U^T D, N^T D, D^T D. A program computes one (WIDTH, WIDTH) part of each, so that they fit in registers.
    """
    tile = tl.program_id(1)
    side = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    if tl.load(table + side * FIELDS + GRADIENT) != 0:
        u_base = address(table, side, FACTOR)
        m_base = address(table, side, MOMENTUM)
        g_base = address(table, side, GRADIENT)
        height = tl.load(table + side * FIELDS + HEIGHT).to(tl.int32)
        row_stride = tl.load(table + side * FIELDS + ROW_STRIDE)
        column_stride = tl.load(table + side * FIELDS + COLUMN_STRIDE)
        beta = tl.load(decay + side % layers)

        PARTS: tl.constexpr = PADDED // WIDTH
        left = (tl.program_id(0) // PARTS) * WIDTH + tl.arange(0, WIDTH)
        right = (tl.program_id(0) % PARTS) * WIDTH + tl.arange(0, WIDTH)
        u_n = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
        n_n = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
        if NESTEROV:
            u_d = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
            d_d = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
        for row in range(first, tl.minimum(first + CHUNK, height), ROWS):
            rows = row + tl.arange(0, ROWS)
            u = tl.trans(load_block(u_base, rows, left, height, RANK))
            g = load_gradient(g_base, row_stride, column_stride, rows, right, height, RANK)
            n = beta * load_block(m_base, rows, right, height, RANK) + g
            if PARTS == 1:
                g_left, n_left = g, n
            else:
                g_left = load_gradient(g_base, row_stride, column_stride, rows, left, height, RANK)
                n_left = beta * load_block(m_base, rows, left, height, RANK) + g_left
            u_n = tl.dot(u, n, u_n, input_precision="ieee")
            if NESTEROV:
                d = beta * n + g
                u_d = tl.dot(u, d, u_d, input_precision="ieee")
                n_n = tl.dot(tl.trans(n_left), d, n_n, input_precision="ieee")
                d_d = tl.dot(tl.trans(beta * n_left + g_left), d, d_d, input_precision="ieee")
            else:
                n_n = tl.dot(tl.trans(n_left), n, n_n, input_precision="ieee")

        BLOCKS: tl.constexpr = 4 if NESTEROV else 2
        out = partials + tl.cast(tile, tl.int64) * (BLOCKS * PADDED * PADDED)
        out += left[:, None] * PADDED + right[None, :]
        tl.store(out, u_n)
        if NESTEROV:
            tl.store(out + PADDED * PADDED, u_d)
            tl.store(out + 2 * PADDED * PADDED, n_n)
            tl.store(out + 3 * PADDED * PADDED, d_d)
        else:
            tl.store(out + PADDED * PADDED, n_n)


@triton.jit
def add_chunks(out, partials, first, count, stride, PADDED: tl.constexpr):
    """out = the sum of `count` (PADDED, PADDED) blocks of `partials`, always in the same order; ends with a barrier."""
    TILE: tl.constexpr = min(PADDED, 64)
    for row in range(0, PADDED, TILE):
        for column in range(0, PADDED, TILE):
            place = (row + tl.arange(0, TILE))[:, None] * PADDED + (column + tl.arange(0, TILE))[None, :]
            total = tl.zeros((TILE, TILE), dtype=tl.float32)
            for chunk in range(first, first + count):
                total += tl.load(partials + tl.cast(chunk, tl.int64) * stride + place)
            tl.store(out + place, total)
    tl.debug_barrier()
