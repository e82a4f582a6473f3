"""gram, core and apply against their float64 specification, and the specification against dense linear algebra.

The yardstick of every bound is the error that the specification itself makes in float32, on the same input. That error is
small by luck where there are few entries; a sum of k products in any order is off by about sqrt(k) EPS/2 times the sum of
their magnitudes [Higham & Mary 2019, Theorem 2.4], which is the least that a bound allows.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qriemann.ops import POLAR_RTOL, CoreResult, apply, core, correct, gram
from tests.dense import DenseRiemannion
from tests.ops import specification

EPS = torch.finfo(torch.float32).eps
# Two orders of summation of the same products differ in their worst entry by chance: of 70 shapes the largest ratio seen
# was 2.
SUMMATION = 4
# Heights about the block sizes of kernels, none a multiple; ranks from the smallest to the largest.
HEIGHTS = (1, 7, 15, 17, 31, 33, 63, 65, 127, 129, 255, 257, 1025, 4097)
RANKS = (1, 3, 8, 16, 33, 64, 128)
SHAPES = [(t, r) for t, r in itertools.product(HEIGHTS, RANKS) if t >= r]
PAIRS = [(t, n, r) for (t, r), n in zip(SHAPES, itertools.cycle((4097, 129, 257)), strict=False) if n >= r]


class Side(NamedTuple):
    """One side of one layer, in float32; N and D have normal parts with singular values in [0.5, 1]."""

    u: Tensor
    n: Tensor
    d: Tensor


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def well_conditioned(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Singular values evenly in [0.5, 1]."""
    inner = min(rows, columns)
    left, right = orthonormal(rows, inner, generator), orthonormal(columns, inner, generator)
    return (left * torch.linspace(1, 0.5, inner, dtype=torch.float64)) @ right.mT


def make_sides(m: int, n: int, rank: int, seed: int = 0) -> tuple[Side, Side]:
    """Both sides of a layer whose N and D are the blocks of tangent vectors: both sides measure the same C."""
    generator = torch.Generator().manual_seed(seed)
    cores = [well_conditioned(rank, rank, generator) for _ in range(2)]
    sides = []
    for t, own in ((m, cores), (n, [c.mT for c in cores])):
        basis = orthonormal(t, min(t, 2 * rank), generator)
        normal = basis[:, rank:]
        mixed = [normal @ well_conditioned(normal.shape[1], rank, generator) for _ in own]
        tangents = [(basis[:, :rank] @ c + a).float() for c, a in zip(own, mixed, strict=True)]
        sides.append(Side(basis[:, :rank].float(), *tangents))
    return sides[0], sides[1]


def make_side(t: int, rank: int, seed: int = 0) -> Side:
    """Random columns, for the products that do not mind whether U is orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    return Side(*(torch.randn(t, rank, generator=generator) for _ in range(3)))


def strided(x: Tensor) -> Tensor:
    """The same values in rows that are not contiguous, with NaN in between."""
    spread = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    spread[..., ::2] = x
    return spread[..., ::2]


def transposed(x: Tensor) -> Tensor:
    """The same values, columns contiguous."""
    return x.mT.contiguous().mT


def rounding(products: int) -> float:
    """Relative error of a float32 sum of so many products."""
    return math.sqrt(products) * EPS / 2


def worst(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


LAYOUTS = pytest.mark.parametrize(
    ("layout", "heights"),
    [(torch.clone, HEIGHTS), (strided, HEIGHTS[:-2]), (transposed, HEIGHTS[:-2])],
    ids=["contiguous", "strided", "transposed"],
)


@LAYOUTS
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rank", RANKS)
def test_gram_is_as_exact_as_plain_float32(rank, count, layout, heights):
    for t in heights:
        sides = [make_side(t, rank, seed)[:count] for seed in range(2)]
        results = gram([layout(torch.stack(blocks)) for blocks in zip(*sides, strict=True)])
        for blocks, result in zip(sides, results, strict=True):
            exact = specification.gram(blocks)
            plain = worst(specification.gram(blocks, dtype=torch.float32), exact)
            terms = specification.gram([block.abs() for block in blocks]).max().item()
            assert worst(result, exact) <= max(SUMMATION * plain, rounding(t) * terms), (t, rank)


@LAYOUTS
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rank", RANKS)
def test_apply_is_as_exact_as_plain_float32_and_writes_every_entry(rank, count, layout, heights):
    generator = torch.Generator().manual_seed(0)
    for t in (t for t in heights if t >= rank):
        sides = [make_tall_side(t, rank, seed)[:count] for seed in range(2)]
        # [U, N, D] [P; 0; 0] is orthonormal; the coefficients of N+ are any.
        coefficients = torch.randn(2, count * rank, 2 * rank, generator=generator)
        coefficients[:, :, :rank] = 0
        coefficients[:, :rank, :rank] = torch.stack([orthonormal(rank, rank, generator).float() for _ in range(2)])
        blocks = [layout(torch.stack(block)) for block in zip(*sides, strict=True)]
        momentum, scratch = (layout(torch.full((2, t, rank), torch.nan)) for _ in range(2))
        compensation = correct(blocks[:1], [apply(blocks, coefficients, momentum, scratch)])
        for index, side in enumerate(sides):
            z, t_1, t_2 = torch.cat(side, -1), coefficients[index, :, :rank], coefficients[index, :, rank:]
            # U+ and what S takes on multiply to what was asked for, whatever was corrected.
            for got, columns in (
                (blocks[0][index].double() @ compensation[index].double(), t_1),
                (momentum[index], t_2),
            ):
                exact = z.double() @ columns.double()
                terms = (z.abs() @ columns.abs()).max().item()
                bound = max(SUMMATION * worst(z @ columns, exact), rounding(count * rank) * terms)
                assert worst(got, exact) <= bound, (t, rank)


@pytest.mark.parametrize("rank", RANKS)
def test_apply_returns_orthonormal_factors(rank):
    for t in (t for t in HEIGHTS if t >= rank):
        side = make_tall_side(t, rank, seed=0)[:2]
        coefficients = torch.cat([torch.eye(rank, 2 * rank), torch.zeros(rank, 2 * rank)])
        coefficients[:rank, :rank] = orthonormal(rank, rank, torch.Generator().manual_seed(1)).float()
        blocks = [block[None].clone() for block in side]
        error = apply(blocks, coefficients[None], *(torch.full_like(blocks[0], torch.nan) for _ in range(2)))
        correct(blocks[:1], [error])
        # Errors of U^T U - I up to 2e-6 stay uncorrected, so U is within half of that of the nearest orthonormal one, a
        # row and column of r entries at worst.
        assert worst(blocks[0][0].double().mT @ blocks[0][0].double(), torch.eye(rank)) <= 2e-6 + 2 * EPS
        assert worst(blocks[0][0], specification.apply(side, coefficients).u) <= 1e-6 * math.sqrt(rank)


def make_tall_side(t: int, rank: int, seed: int) -> Side:
    generator = torch.Generator().manual_seed(seed)
    u = orthonormal(t, rank, generator).float()
    return Side(u, *(well_conditioned(t, rank, generator).float() for _ in range(2)))


@pytest.mark.parametrize("drift", [1e-5, 1e-3, 1e-2])
def test_apply_corrects_a_factor_that_drifted_and_hands_the_rest_to_s(drift):
    side = make_tall_side(97, 8, seed=0)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(8, 8, generator=generator)
    bent = torch.eye(8) + drift * (noise + noise.mT) / 16
    coefficients = torch.zeros(1, 16, 16)
    coefficients[0, :8, :8] = bent
    exact = specification.apply(side[:2], coefficients[0])
    blocks = [side.u[None].clone(), side.n[None].clone()]
    error = apply(blocks, coefficients, torch.full((1, 97, 8), torch.nan), torch.full((1, 97, 8), torch.nan))
    compensation = correct(blocks[:1], [error])
    # The series stops after E^2, E = U^T U - I of norm 2 drift or less: (5/16) E^3 and (1/16) E^3 are left out.
    left_out = 5 / 16 * (2 * drift) ** 3 + 8 * EPS
    assert worst(blocks[0][0], exact.u) <= left_out
    assert worst(compensation[0], exact.compensation) <= left_out


class Outcome(NamedTuple):
    """What does not depend on the gauge: X+ and the projections M+ V+ V+^T and U+ U+^T M+, in orthonormal coordinates."""

    x: Tensor
    along_v: Tensor
    along_u: Tensor


def outcome(result: CoreResult, z_u: Tensor, z_v: Tensor) -> Outcome:
    """In the coordinates of Q_u, Q_v with z = Q R: a Frobenius norm there is one of the m x n matrix."""
    rank = result.s.shape[-1]
    left, right = (
        torch.linalg.qr(z.double())[1] @ t.double() for z, t in zip((z_u, z_v), result.coefficients, strict=True)
    )
    u, n_u, v, n_v = left[:, :rank], left[:, rank:], right[:, :rank], right[:, rank:]
    return Outcome(u @ result.s.double() @ v.mT, n_u @ v.mT, u @ n_v.mT)


def layer(result: CoreResult, index: int) -> CoreResult:
    return CoreResult(result.coefficients[:, index], result.s[index], result.moved[index])


def both_grams(sides_u: list[Side], sides_v: list[Side]) -> Tensor:
    """(2, layers, p, q)."""
    return torch.stack([gram([torch.stack(b) for b in zip(*sides, strict=True)]) for sides in (sides_u, sides_v)])


OPTIONS = [
    {},
    {"tangent_iterations": 3},
    {"momentum_form": "orthogonalized"},
    {"momentum_form": "orthogonalized", "tangent_iterations": 2},
]


def check_core(sides_u: list[Side], sides_v: list[Side], s: Tensor, *, lr: float, options: dict) -> None:
    grams = both_grams(sides_u, sides_v)
    layers = len(sides_u)
    rates, decays = torch.full((layers,), lr), torch.full((layers,), 0.1)
    active = torch.ones(layers, dtype=torch.bool)
    results = core(grams, s, rates, decays, active, **options)
    assert results.moved.all()
    for index in range(layers):
        inputs = (grams[:, index], s[index], rates[index], decays[index], active[index])
        z_u, z_v = torch.cat(sides_u[index], -1), torch.cat(sides_v[index], -1)
        exact = outcome(specification.core(*inputs, **options), z_u, z_v)
        plain = outcome(specification.core(*inputs, **options, dtype=torch.float32), z_u, z_v)
        got = outcome(layer(results, index), z_u, z_v)
        for name, truth, own, ours in zip(Outcome._fields, exact, plain, got, strict=True):
            # t_u, S and t_v are rounded once each, and the truncation stops at 1e-7 of the norm (about EPS).
            bound = SUMMATION * (own - truth).norm() + 4 * EPS * truth.norm()
            assert (ours - truth).norm() <= bound, (name, z_u.shape, z_v.shape, options)


@pytest.mark.parametrize(("m", "n", "rank"), [p for p in PAIRS if max(p) < 1000])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_core_is_as_exact_as_plain_float32(m, n, rank, options):
    u, v = make_sides(m, n, rank)
    generator = torch.Generator().manual_seed(1)
    s = well_conditioned(rank, rank, generator).float()[None]
    for count in (2, 3):
        check_core([u[:count]], [v[:count]], s, lr=0.01, options=options)


@pytest.mark.parametrize("momentum_form", ["raw", "orthogonalized"])
@pytest.mark.parametrize("tangent_iterations", [1, 3])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_specification_is_the_dense_step(momentum_form, tangent_iterations, nesterov, start):
    generator = torch.Generator().manual_seed(0)
    u, v = orthonormal(14, 3, generator), orthonormal(11, 3, generator)
    s = start * torch.diag(torch.tensor([1.0, 0.8, 0.6], dtype=torch.float64))
    dense = DenseRiemannion(u @ s @ v.mT, u, v, POLAR_RTOL)
    n_u, n_v = torch.zeros_like(u), torch.zeros_like(v)
    lr, decay = torch.tensor(0.02, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    for _ in range(5):
        g = torch.randn(14, 11, generator=generator, dtype=torch.float64)
        g_u, g_v = g @ v, g.mT @ u
        n_u, n_v = 0.9 * n_u + g_u, 0.9 * n_v + g_v
        left, right = ([u, n_u], [v, n_v])
        if nesterov:
            left, right = [*left, g_u + 0.9 * n_u], [*right, g_v + 0.9 * n_v]
        result = specification.core(
            torch.stack([specification.gram(left), specification.gram(right)]),
            s,
            lr,
            decay,
            torch.tensor(True),
            tangent_iterations=tangent_iterations,
            momentum_form=momentum_form,
        )
        new_left, new_right = (
            specification.apply(blocks, t) for blocks, t in zip((left, right), result.coefficients, strict=True)
        )
        s = new_left.compensation @ result.s @ new_right.compensation
        (u, n_u, _), (v, n_v, _) = new_left, new_right
        dense.step(
            g,
            0.02,
            0.9,
            0.1,
            tangent_iterations=tangent_iterations,
            nesterov=nesterov,
            momentum_form=momentum_form,
        )
        # Both fill the bases up by 1e-9 ||Y|| U V^T, which turns the kept directions by that over their gap, here 1e-2.
        torch.testing.assert_close(u @ s @ v.mT, dense.x, rtol=0, atol=1e-8)
        torch.testing.assert_close(n_u, dense.m @ v, rtol=0, atol=1e-7 * dense.m.norm())
        torch.testing.assert_close(n_v, dense.m.mT @ u, rtol=0, atol=1e-7 * dense.m.norm())


class AddsRowAfterRow(TorchDispatchMode):
    """A library whose products are sums in sequence, in float32."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            products = (args[0].mT[..., None] * args[1][..., None, :]).numpy()
            return torch.from_numpy(np.add.accumulate(products, axis=1)[:, -1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [14336, 11008, 1025])
def test_long_columns_lose_little_whatever_the_order_of_a_librarys_sums(rows):
    u = orthonormal(rows, 3, torch.Generator().manual_seed(0)).float()[None]
    with AddsRowAfterRow():
        found, at_once = gram([u, u]), torch.bmm(u.mT, u)
    truth = torch.cat([u.double().mT @ u.double()] * 2, -2)
    # The roundings, at random and by EPS / 2: of 1,024 partial sums of at most 1,024 / rows in each of the blocks, and of the
    # blocks' sums, which are at most one.
    bound = 2 * EPS * (math.sqrt(1024) * 1024 / rows * math.sqrt(rows / 1024) + math.sqrt(rows / 1024)) / 2
    assert (found - truth).abs().max() < bound
    if rows > 10000:
        assert (at_once - truth[:, :3]).abs().max() > bound
