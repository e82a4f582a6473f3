"""Second tall pass: the new factors and momenta in place, and the repair of the factors' orthonormality."""

# ruff: noqa: N803, N806 - constexpr arguments are spelled as constants, as Triton's own are.
from __future__ import annotations

import triton
import triton.language as tl

from qriemann.ops.triton.gram import add_chunks
from qriemann.ops.triton.products import clear, combine, measure, multiply_square
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
def apply_kernel(
    table,
    tiles,
    decay,
    moved,
    coefficients,
    partials,
    layers,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    NESTEROV: tl.constexpr,
    RAW: tl.constexpr,
):
    """U <- U t_0 + D t_1, m <- U t_2 + N t_3 on one chunk of rows, and the chunk's part of the new U^T U.

    N = beta m + g, D = beta N + g with NESTEROV and N without; where not RAW the momentum is made from D too. The four
    (PADDED, PADDED) blocks of `coefficients`, a side, are t_0 to t_3. Sides of layers that are not `moved` are not touched.
    """
    tile = tl.program_id(0)
    side = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    if tl.load(moved + side % layers) != 0:
        u_base = address(table, side, FACTOR)
        m_base = address(table, side, MOMENTUM)
        g_base = address(table, side, GRADIENT)
        height = tl.load(table + side * FIELDS + HEIGHT).to(tl.int32)
        row_stride = tl.load(table + side * FIELDS + ROW_STRIDE)
        column_stride = tl.load(table + side * FIELDS + COLUMN_STRIDE)
        beta = tl.load(decay + side % layers)

        BLOCK: tl.constexpr = PADDED * PADDED
        columns = tl.arange(0, PADDED)
        t = coefficients + tl.cast(side, tl.int64) * (4 * BLOCK)
        u_u = tl.zeros((PADDED, PADDED), dtype=tl.float32)
        for row in range(first, tl.minimum(first + CHUNK, height), ROWS):
            rows = row + tl.arange(0, ROWS)
            u_new = tl.zeros((ROWS, PADDED), dtype=tl.float32)
            m_new = tl.zeros((ROWS, PADDED), dtype=tl.float32)
            for depth in range(0, PADDED, DEPTH):
                inner = depth + tl.arange(0, DEPTH)
                t_inner = t + inner[:, None] * PADDED + columns[None, :]
                u = load_block(u_base, rows, inner, height, RANK)
                g = load_gradient(g_base, row_stride, column_stride, rows, inner, height, RANK)
                n = beta * load_block(m_base, rows, inner, height, RANK) + g
                d = n
                if NESTEROV:
                    d = beta * n + g
                u_new = tl.dot(u, tl.load(t_inner), u_new, input_precision="ieee")
                u_new = tl.dot(d, tl.load(t_inner + BLOCK), u_new, input_precision="ieee")
                m_new = tl.dot(u, tl.load(t_inner + 2 * BLOCK), m_new, input_precision="ieee")
                if RAW:
                    d = n
                m_new = tl.dot(d, tl.load(t_inner + 3 * BLOCK), m_new, input_precision="ieee")
            # In place: every thread has read these rows before one of them writes.
            tl.debug_barrier()
            inside = (rows < height)[:, None] & (columns < RANK)[None, :]
            place = rows.to(tl.int64)[:, None] * RANK + columns[None, :]
            tl.store(u_base + place, u_new, mask=inside)
            tl.store(m_base + place, m_new, mask=inside)
            u_u = tl.dot(tl.trans(u_new), u_new, u_u, input_precision="ieee")
        tl.store(partials + tile.to(tl.int64) * BLOCK + columns[:, None] * PADDED + columns[None, :], u_u)


@triton.jit
def finish_kernel(
    side_tiles,
    moved,
    drifted,
    workspace,
    partials,
    s_new,
    s,
    layers,
    tolerance,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The repair of both factors of one layer, and its new S.

    With U^T U = I + E and max|E| > tolerance, a side is `drifted`: U takes (I + E)^(-1/2) on its right, to second order (the
    workspace's first block is that less I; `correct_kernel` applies it), and S takes (I + E)^(1/2) on this side, so that X
    stays as it is.

    Args:
        workspace: four (PADDED, PADDED) blocks a side; the coefficients, which `apply_kernel` is done with.
    """
    layer = tl.program_id(0)
    if tl.load(moved + layer) != 0:
        BLOCK: tl.constexpr = PADDED * PADDED
        for index in range(2):
            side = layer + index * layers
            repair = workspace + tl.cast(side, tl.int64) * (4 * BLOCK)
            compensation, e, e_squared = repair + BLOCK, repair + 2 * BLOCK, repair + 3 * BLOCK
            first = tl.load(side_tiles + side)
            clear(compensation, PADDED, PADDED, PADDED, RANK)
            add_chunks(e, partials, first, tl.load(side_tiles + side + 1) - first, BLOCK, PADDED)
            combine(e, e, compensation, 1.0, -1.0, PADDED, PADDED, PADDED, PADDED, PADDED, False)
            _, error, _ = measure(e, PADDED, PADDED, PADDED)
            if error > tolerance:
                multiply_square(e_squared, e, e, e, 1.0, 0.0, PADDED, False, False, False, DEPTH)
                combine(repair, e, e_squared, -0.5, 0.375, PADDED, PADDED, PADDED, PADDED, PADDED, False)
                combine(compensation, compensation, e, 1.0, 0.5, PADDED, PADDED, PADDED, PADDED, PADDED, False)
                combine(
                    compensation, compensation, e_squared, 1.0, -0.125, PADDED, PADDED, PADDED, PADDED, PADDED, False
                )
            tl.store(drifted + side, (error > tolerance).to(tl.int32))

        u_work = workspace + tl.cast(layer, tl.int64) * (4 * BLOCK)
        v_work = workspace + tl.cast(layer + layers, tl.int64) * (4 * BLOCK)
        left, both = u_work + 2 * BLOCK, u_work + 3 * BLOCK
        new = s_new + tl.cast(layer, tl.int64) * BLOCK
        multiply_square(left, u_work + BLOCK, new, new, 1.0, 0.0, PADDED, False, False, False, DEPTH)
        multiply_square(both, left, v_work + BLOCK, new, 1.0, 0.0, PADDED, False, True, False, DEPTH)
        rows = tl.arange(0, PADDED)
        inside = (rows < RANK)[:, None] & (rows < RANK)[None, :]
        value = tl.load(both + rows[:, None] * PADDED + rows[None, :])
        out = s + tl.cast(layer, tl.int64) * (RANK * RANK)
        tl.store(out + rows[:, None] * RANK + rows[None, :], value, mask=inside)


@triton.jit
def correct_kernel(
    table,
    tiles,
    moved,
    drifted,
    workspace,
    layers,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """U <- U (I + E)^(-1/2) on one chunk of rows of a drifted side; the others cost one read of a flag."""
    tile = tl.program_id(0)
    side = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    # `drifted` of a layer that did not move is an older step's.
    if (tl.load(moved + side % layers) != 0) & (tl.load(drifted + side) != 0):
        base = address(table, side, FACTOR)
        height = tl.load(table + side * FIELDS + HEIGHT).to(tl.int32)
        columns = tl.arange(0, PADDED)
        repair = workspace + tl.cast(side, tl.int64) * (4 * PADDED * PADDED)
        for row in range(first, tl.minimum(first + CHUNK, height), ROWS):
            rows = row + tl.arange(0, ROWS)
            u_new = load_block(base, rows, columns, height, RANK)
            for depth in range(0, PADDED, DEPTH):
                inner = depth + tl.arange(0, DEPTH)
                u = load_block(base, rows, inner, height, RANK)
                right = tl.load(repair + inner[:, None] * PADDED + columns[None, :])
                u_new = tl.dot(u, right, u_new, input_precision="ieee")
            tl.debug_barrier()
            inside = (rows < height)[:, None] & (columns < RANK)[None, :]
            tl.store(base + rows.to(tl.int64)[:, None] * RANK + columns[None, :], u_new, mask=inside)
