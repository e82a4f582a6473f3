"""Projection and inner product against matrices that are materialized in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qriemann.geometry import FixedRankPoint, FixedRankTangent, inner, project, random_orthonormal
from tests.dense import tangent_projection

# The textbook formulas in float64 on matrices of norm 20; a handful of products of up to 30 terms.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SHAPES = [(30, 20, 4), (20, 30, 3), (17, 12, 1), (12, 8, 8), (6, 6, 6)]


class Case:
    def __init__(self, m: int, n: int, rank: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        # Rounded to float32 the bases are orthonormal to 1e-7 only; a second factorization makes them so in float64.
        u, v = (torch.linalg.qr(random_orthonormal(t, rank, self.generator).double())[0] for t in (m, n))
        self.point = FixedRankPoint(u, self.randn(rank, rank), v)
        self.g, self.h = self.randn(m, n), self.randn(m, n)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def project(self, g: Tensor, point: FixedRankPoint | None = None) -> FixedRankTangent:
        point = point or self.point
        return project(point, g @ point.v, g.mT @ point.u)


@pytest.fixture(params=SHAPES, ids=str)
def case(request) -> Case:
    return Case(*request.param)


def test_projection_is_the_dense_projection(case):
    expected = tangent_projection(case.g, case.point.u, case.point.v)
    torch.testing.assert_close(case.project(case.g).dense(case.point), expected, **TIGHT)


def test_projection_is_idempotent(case):
    once = case.project(case.g)
    twice = case.project(once.dense(case.point))
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(second, first, **TIGHT)


def test_projection_is_self_adjoint(case):
    left = (case.project(case.g).dense(case.point) * case.h).sum()
    right = (case.g * case.project(case.h).dense(case.point)).sum()
    torch.testing.assert_close(left, right, **TIGHT)


def test_what_projection_leaves_is_orthogonal_to_every_tangent_vector(case):
    rest = case.g - case.project(case.g).dense(case.point)
    tangent = case.project(case.h).dense(case.point)
    torch.testing.assert_close((rest * tangent).sum(), torch.zeros((), dtype=torch.float64), **TIGHT)


def test_the_perpendicular_blocks_are_perpendicular(case):
    tangent = case.project(case.g)
    for basis, block in ((case.point.u, tangent.u_perp), (case.point.v, tangent.v_perp)):
        torch.testing.assert_close(basis.mT @ block, torch.zeros_like(tangent.core), **TIGHT)


def test_a_tangent_vector_has_the_blocks_it_was_projected_from(case):
    dense = case.project(case.g).dense(case.point)
    torch.testing.assert_close(dense @ case.point.v, case.g @ case.point.v, **TIGHT)
    torch.testing.assert_close(dense.mT @ case.point.u, case.g.mT @ case.point.u, **TIGHT)


def test_projection_does_not_depend_on_how_the_point_is_factored(case):
    rank = case.point.s.shape[0]
    q, p = (torch.linalg.qr(case.randn(rank, rank))[0] for _ in range(2))
    turned = FixedRankPoint(case.point.u @ q, q.mT @ case.point.s @ p, case.point.v @ p)
    torch.testing.assert_close(turned.dense(), case.point.dense(), **TIGHT)
    torch.testing.assert_close(
        case.project(case.g, turned).dense(turned), case.project(case.g).dense(case.point), **TIGHT
    )


def test_the_inner_product_is_that_of_the_matrices(case):
    first, second = case.project(case.g), case.project(case.h)
    expected = (first.dense(case.point) * second.dense(case.point)).sum()
    torch.testing.assert_close(inner(first, second), expected, **TIGHT)


def test_a_batch_is_projected_as_each_point_alone():
    cases = [Case(9, 7, 2) for _ in range(3)]
    for index, case in enumerate(cases):
        case.g = case.g * (index + 1)
    batch = FixedRankPoint(*(torch.stack(parts) for parts in zip(*(c.point for c in cases), strict=True)))
    g = torch.stack([c.g for c in cases])
    together = project(batch, g @ batch.v, g.mT @ batch.u)
    alone = [c.project(c.g) for c in cases]
    for got, expected in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected), **TIGHT)
    torch.testing.assert_close(inner(together, together), torch.stack([inner(t, t) for t in alone]), **TIGHT)
