"""Where the tall matrices lie: one row of addresses a side, so that a kernel reads the layers' own memory.

A side is U or V of a layer: row i of the table is U of layer i, row L + i its V. Factor and momentum are contiguous (t, r);
the gradient has any strides, since `lora_A.weight.grad` is the transpose of what V needs.
"""

# ruff: noqa: N803 - constexpr arguments are spelled as constants, as Triton's own are.
from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table, all int64. Address 0 for the gradient: this layer is not stepped.
FACTOR = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
GRADIENT = tl.constexpr(2)
HEIGHT = tl.constexpr(3)
ROW_STRIDE = tl.constexpr(4)
COLUMN_STRIDE = tl.constexpr(5)
FIELDS = tl.constexpr(6)


@triton.jit
def address(table, side, FIELD: tl.constexpr):
    """Pointer to the float32 memory that a field of the table names."""
    return tl.load(table + side * FIELDS + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def load_block(base, rows, columns, height, RANK: tl.constexpr):
    """Rows and columns of a contiguous (t, r) matrix, zero outside it."""
    inside = (rows < height)[:, None] & (columns < RANK)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * RANK + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_gradient(base, row_stride, column_stride, rows, columns, height, RANK: tl.constexpr):
    """Likewise of a (t, r) matrix of any strides."""
    if row_stride == 1:
        # Neighbouring threads along the rows: the gradient of lora_A as torch allocates it, (r, n) row-major.
        inside_turned = (columns < RANK)[:, None] & (rows < height)[None, :]
        place_turned = columns.to(tl.int64)[:, None] * column_stride + rows[None, :]
        block = tl.trans(tl.load(base + place_turned, mask=inside_turned, other=0.0))
    else:
        inside = (rows < height)[:, None] & (columns < RANK)[None, :]
        place = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
        block = tl.load(base + place, mask=inside, other=0.0)
    return block
