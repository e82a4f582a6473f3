"""The step itself, one program a layer: project, direction, retract and transport; see qriemann.ops.core for the formulas."""

# ruff: noqa: N803, N806 - constexpr arguments are spelled as constants, as Triton's own are.
from __future__ import annotations

import triton
import triton.language as tl

from qriemann.ops.triton.factor import factor_gram
from qriemann.ops.triton.gram import add_chunks
from qriemann.ops.triton.products import clear, combine, copy, measure, multiply, multiply_square
from qriemann.ops.triton.sides import FIELDS, GRADIENT
from qriemann.ops.triton.truncate import truncate

# Room of one program in units of PADDED^2 floats: two sides of 10, six 2r x 2r matrices of 4, one for Gram-Schmidt. A side:
#   0 U^T N   1 U^T D   2 A_N^T A_D   3 A_D^T A_D   4 R   5 R^-1   6 R^-1 times the basis's lower half   7 small room
#   8, 9 basis: P for U, W for V
SIDE_BLOCKS = 10
SLOT_BLOCKS = 2 * SIDE_BLOCKS + 6 * 4 + 1
# Singular values of 2.5e-4 end at the quintic's edge; shrunk like this, those of about POLAR_RTOL times the largest do.
_SHRINK = tl.constexpr(0.4)
_SIDE_BLOCKS = tl.constexpr(SIDE_BLOCKS)
_SLOT_BLOCKS = tl.constexpr(SLOT_BLOCKS)


@triton.jit
def core_kernel(
    table,
    side_tiles,
    partials,
    s,
    lr,
    weight_decay,
    polar_coefficients,
    scratch,
    coefficients,
    s_new,
    moved,
    skipped,
    layers,
    tolerance,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    DEPTH: tl.constexpr,
    POLAR_STEPS: tl.constexpr,
    TANGENT_ITERATIONS: tl.constexpr,
    NESTEROV: tl.constexpr,
    RAW: tl.constexpr,
):
    """Coefficients of both sides (four blocks each, as `apply_kernel` takes them), the new S and `moved` of each layer.

    A layer is not moved where it has no gradient, or its Gram matrices or its result are not finite; the latter two are
    counted in `skipped`.
    """
    BLOCK: tl.constexpr = PADDED * PADDED
    slot = scratch + tl.program_id(0).to(tl.int64) * (_SLOT_BLOCKS * BLOCK)
    for layer in range(tl.program_id(0), layers, tl.num_programs(0)):
        tl.store(moved + layer, 0)
        if tl.load(table + layer * FIELDS + GRADIENT) != 0:
            broken = _collect(slot, side_tiles, partials, layer, layers, PADDED, NESTEROV)
            if broken == 0:
                t_u = coefficients + tl.cast(layer, tl.int64) * (4 * BLOCK)
                t_v = coefficients + tl.cast(layer + layers, tl.int64) * (4 * BLOCK)
                new = s_new + tl.cast(layer, tl.int64) * BLOCK
                _step(
                    slot, s + tl.cast(layer, tl.int64) * (RANK * RANK), tl.load(lr + layer), tl.load(weight_decay + layer),
                    polar_coefficients, t_u, t_v, new, tolerance,
                    RANK, PADDED, DEPTH, POLAR_STEPS, TANGENT_ITERATIONS, NESTEROV, RAW,
                )  # fmt: skip
                _, _, broken_u = measure(t_u, 4 * PADDED, PADDED, PADDED)
                _, _, broken_v = measure(t_v, 4 * PADDED, PADDED, PADDED)
                _, _, broken_s = measure(new, PADDED, PADDED, PADDED)
                broken = broken_u + broken_v + broken_s
            tl.store(moved + layer, (broken == 0).to(tl.int32))
            # Whole numbers: their sum does not depend on the order.
            tl.atomic_add(skipped, (broken != 0).to(tl.int64))
        tl.debug_barrier()


@triton.jit
def _collect(slot, side_tiles, partials, layer, layers, PADDED: tl.constexpr, NESTEROV: tl.constexpr):
    """Adds up the chunks of the Gram matrices of both sides; returns how many of their entries are not finite."""
    BLOCK: tl.constexpr = PADDED * PADDED
    BLOCKS: tl.constexpr = 4 if NESTEROV else 2
    broken = 0
    for index in range(2):
        side = layer + index * layers
        base = slot + index * (_SIDE_BLOCKS * BLOCK)
        first = tl.load(side_tiles + side)
        count = tl.load(side_tiles + side + 1) - first
        add_chunks(base, partials, first, count, BLOCKS * BLOCK, PADDED)
        if NESTEROV:
            add_chunks(base + BLOCK, partials + BLOCK, first, count, BLOCKS * BLOCK, PADDED)
            add_chunks(base + 2 * BLOCK, partials + 2 * BLOCK, first, count, BLOCKS * BLOCK, PADDED)
            add_chunks(base + 3 * BLOCK, partials + 3 * BLOCK, first, count, BLOCKS * BLOCK, PADDED)
        else:
            add_chunks(base + 3 * BLOCK, partials + BLOCK, first, count, BLOCKS * BLOCK, PADDED)
            copy(base + BLOCK, base, 1.0, PADDED, PADDED, PADDED, PADDED, False)
            copy(base + 2 * BLOCK, base + 3 * BLOCK, 1.0, PADDED, PADDED, PADDED, PADDED, False)
        _, _, here = measure(base, 4 * PADDED, PADDED, PADDED)
        broken += here
    return broken


@triton.jit
def _step(
    slot,
    s,
    lr,
    weight_decay,
    polar_coefficients,
    t_u,
    t_v,
    s_new,
    tolerance,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    DEPTH: tl.constexpr,
    POLAR_STEPS: tl.constexpr,
    TANGENT_ITERATIONS: tl.constexpr,
    NESTEROV: tl.constexpr,
    RAW: tl.constexpr,
):
    BLOCK: tl.constexpr = PADDED * PADDED
    TALL: tl.constexpr = 2 * PADDED
    TILE: tl.constexpr = min(PADDED, 64)
    SQUARE: tl.constexpr = TALL * TALL
    u, v = slot, slot + _SIDE_BLOCKS * BLOCK
    k = slot + 2 * _SIDE_BLOCKS * BLOCK
    y, y_transposed, work = k + SQUARE, k + 2 * SQUARE, k + 3 * SQUARE
    panel_scratch = slot + (_SLOT_BLOCKS - 1) * BLOCK

    # Project: A_N^T A_D = N^T D - (U^T N)^T (U^T D), and R of A_D.
    for index in range(2):
        side = slot + index * (_SIDE_BLOCKS * BLOCK)
        # The lengths of D's columns, which the noise of its normal part is relative to.
        entry = tl.arange(0, PADDED)
        tl.store(side + 7 * BLOCK + entry, tl.sqrt_rn(tl.load(side + 3 * BLOCK + entry * (PADDED + 1))))
        tl.debug_barrier()
        multiply_square(
            side + 2 * BLOCK, side, side + BLOCK, side + 2 * BLOCK, -1.0, 1.0, PADDED, True, False, True, DEPTH
        )
        multiply_square(
            side + 3 * BLOCK, side + BLOCK, side + BLOCK, side + 3 * BLOCK, -1.0, 1.0, PADDED, True, False, True, DEPTH
        )
        factor_gram(side + 4 * BLOCK, side + 5 * BLOCK, side + 3 * BLOCK, side + 7 * BLOCK, tolerance, RANK, PADDED)

    # Direction: D = [U Q_A] K [V Q_B]^T, K = [[C, R_B^T], [R_A, 0]]; both sides measure C.
    clear(k, TALL, TALL, TALL, 0)
    combine(k, u + BLOCK, v + BLOCK, 0.5, 0.5, PADDED, PADDED, TALL, PADDED, PADDED, True)
    copy(k + PADDED, v + 4 * BLOCK, 1.0, PADDED, PADDED, TALL, PADDED, True)
    copy(k + PADDED * TALL, u + 4 * BLOCK, 1.0, PADDED, PADDED, TALL, PADDED, False)
    for _ in range(TANGENT_ITERATIONS):
        _polar(k, y, polar_coefficients, PADDED, DEPTH, POLAR_STEPS)
        clear(k + PADDED * TALL + PADDED, PADDED, PADDED, TALL, 0)

    # Retract, with y divided by its largest entry: its size is that of S and lr, whatever they are.
    copy(y, k, -lr, TALL, TALL, TALL, TALL, False)
    entry = tl.arange(0, PADDED)
    inside = (entry < RANK)[:, None] & (entry < RANK)[None, :]
    old = tl.load(s + entry[:, None] * RANK + entry[None, :], mask=inside, other=0.0)
    corner = y + entry[:, None] * TALL + entry[None, :]
    tl.store(corner, tl.load(corner) + (1.0 - lr * weight_decay) * old)
    tl.debug_barrier()
    _, size, _ = measure(y, TALL, TALL, TALL)
    size = tl.where(size > 0, size, 1.0)
    copy(y, y, 1.0 / size, TALL, TALL, TALL, TALL, False)
    copy(y_transposed, y, 1.0, TALL, TALL, TALL, TALL, True)
    truncate(u + 8 * BLOCK, v + 8 * BLOCK, s_new, y, y_transposed, work, panel_scratch, RANK, PADDED, DEPTH)
    copy(s_new, s_new, size, PADDED, PADDED, PADDED, PADDED, False)

    # Coefficients. What U's side calls its own basis P and the other's W is W and P for V's, with K transposed.
    copy(y, k, 1.0, TALL, TALL, TALL, TALL, True)
    for index in range(2):
        side = slot + index * (_SIDE_BLOCKS * BLOCK)
        multiply_square(
            side + 6 * BLOCK, side + 5 * BLOCK, side + 9 * BLOCK, side, 1.0, 0.0, PADDED, False, False, False, DEPTH
        )
    for index in range(2):
        own = slot + index * (_SIDE_BLOCKS * BLOCK)
        other = slot + (1 - index) * (_SIDE_BLOCKS * BLOCK)
        t = t_u
        direction = k
        if index == 1:
            t = t_v
            direction = y
        # U+ = U (P_1 - C_D q) + D q with q = R_A^-1 P_2.
        multiply_square(t, own + BLOCK, own + 6 * BLOCK, own + 8 * BLOCK, -1.0, 1.0, PADDED, False, False, True, DEPTH)
        copy(t + BLOCK, own + 6 * BLOCK, 1.0, PADDED, PADDED, PADDED, PADDED, False)
        if RAW:
            # M V+ = N W_1 + U (B_N^T B_D) R_B^-1 W_2
            multiply_square(
                t + 2 * BLOCK, other + 2 * BLOCK, other + 6 * BLOCK, own, 1.0, 0.0, PADDED, False, False, False, DEPTH
            )
            copy(t + 3 * BLOCK, other + 8 * BLOCK, 1.0, PADDED, PADDED, PADDED, PADDED, False)
        else:
            # O V+ = U (O_C W_1 + O_B W_2 - C_D f) + D f with f = R_A^-1 O_A W_1.
            multiply(
                own + 7 * BLOCK, direction + PADDED * TALL, other + 8 * BLOCK, own, 1.0, 0.0,
                PADDED, PADDED, PADDED, PADDED, TALL, PADDED, False, False, False, TILE, DEPTH,
            )  # fmt: skip
            multiply_square(
                t + 3 * BLOCK, own + 5 * BLOCK, own + 7 * BLOCK, own, 1.0, 0.0, PADDED, False, False, False, DEPTH
            )
            multiply(
                t + 2 * BLOCK, direction, other + 8 * BLOCK, own, 1.0, 0.0,
                PADDED, PADDED, TALL, PADDED, TALL, PADDED, False, False, False, TILE, DEPTH,
            )  # fmt: skip
            multiply_square(
                t + 2 * BLOCK, own + BLOCK, t + 3 * BLOCK, t + 2 * BLOCK, -1.0, 1.0, PADDED, False, False, True, DEPTH
            )


@triton.jit
def _polar(k, work, coefficients, PADDED: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr):
    """k <- its polar factor; `work` has room for three matrices like k. See qriemann.ops.polar.

    The cubics leave singular values under the cut-off somewhere between 0 and 1, and lift rounding noise a
    thousandfold. There is no SVD here to finish them, so a last quintic, x (2.5 x^2 - 1.5 x^4), pushes what lies under 0.8
    down, while 1 is a fixed point to second order. The cut-off stays soft: relative to `norm` below, singular values
    from 1.3e-3 come within 5e-4 of one, 6e-4 ends halfway, 2.5e-4 at 0.15 and 2.5e-5 at 2e-4.
    """
    TALL: tl.constexpr = 2 * PADDED
    SQUARE: tl.constexpr = TALL * TALL
    gram, gram_squared = work + SQUARE, work + 2 * SQUARE
    _, largest, _ = measure(k, TALL, TALL, TALL)
    copy(k, k, 1.0 / tl.where(largest > 0, largest, 1.0), TALL, TALL, TALL, TALL, False)
    multiply_square(gram, k, k, k, 1.0, 0.0, TALL, True, False, False, DEPTH)
    multiply_square(gram_squared, gram, gram, gram, 1.0, 0.0, TALL, False, False, False, DEPTH)
    squares, _, _ = measure(gram_squared, TALL, TALL, TALL)
    # trace((K^T K)^4)^(1/8) bounds the largest singular value from above, by a factor of 1.1 to 1.6 in practice. With the
    # 2 in place of the 4, as the torch path has it, 2.5 at rank 128, and the cut-off would move with it.
    norm = tl.sqrt_rn(tl.sqrt_rn(tl.sqrt_rn(squares))) / _SHRINK
    copy(k, k, 1.0 / tl.where(norm > 0, norm, 1.0), TALL, TALL, TALL, TALL, False)
    for step in range(STEPS + 1):
        source = k
        target = work
        if step % 2 == 1:
            source = work
            target = k
        multiply_square(gram, source, source, source, 1.0, 0.0, TALL, True, False, False, DEPTH)
        a = 0.0
        b = 1.0
        if step < STEPS:
            a = tl.load(coefficients + 2 * step)
            b = tl.load(coefficients + 2 * step + 1)
        else:
            multiply_square(gram_squared, gram, gram, gram, -1.5, 2.5, TALL, False, False, True, DEPTH)
            copy(gram, gram_squared, 1.0, TALL, TALL, TALL, TALL, False)
        multiply_square(target, source, gram, source, b, a, TALL, False, False, True, DEPTH)
    if STEPS % 2 == 0:
        copy(k, work, 1.0, TALL, TALL, TALL, TALL, False)
