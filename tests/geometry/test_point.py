"""Points are exactly the matrices they are made from, and their bases are orthonormal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qriemann.geometry import point_from_factors, random_orthonormal
from tests.models import relative

# Factored in float64 and rounded once: U, S, V carry 2^-24 = 6e-8 relative each.
POINT_RTOL = 3e-7
# r <= 8 products of entries below 1, each rounded to 6e-8.
ORTHONORMAL_ATOL = 5e-7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def assert_orthonormal(basis: Tensor) -> None:
    basis = basis.double()
    torch.testing.assert_close(
        basis.mT @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=ORTHONORMAL_ATOL
    )


@pytest.mark.parametrize(("rows", "rank"), [(30, 4), (8, 8), (17, 1)])
def test_a_random_basis_is_orthonormal(rows, rank):
    assert_orthonormal(random_orthonormal(rows, rank, generator()))


def test_random_subspaces_have_no_preferred_direction():
    source, draws, rows, rank = generator(), 4000, 6, 2
    bases = torch.stack([random_orthonormal(rows, rank, source) for _ in range(draws)]).double()
    mean_projector = (bases @ bases.mT).mean(0)
    # E[U U^T] = (r / n) I. An entry's variance is below 1 / n, so 5 standard errors are below 5 / sqrt(6 * 4000) = 0.033.
    torch.testing.assert_close(mean_projector, torch.eye(rows, dtype=torch.float64) * rank / rows, rtol=0, atol=0.033)


def deficient(m: int, n: int, rank: int) -> tuple[Tensor, Tensor]:
    return randn(m, rank - 2) @ randn(rank - 2, rank, seed=1), randn(rank, n, seed=2)


FACTORS = {
    "full rank": (randn(30, 4), randn(4, 20, seed=1)),
    "rank-deficient B": deficient(30, 20, 4),
    "rank-deficient A": tuple(f.mT for f in reversed(deficient(20, 30, 4))),
    "rank one": (randn(30, 1), randn(1, 20, seed=1)),
    "r = min(m, n)": (randn(30, 8), randn(8, 8, seed=1)),
    "tiny": (1e-12 * randn(30, 4), 1e-12 * randn(4, 20, seed=1)),
    "ill conditioned": (randn(30, 4) * torch.tensor([1.0, 1e-3, 1e-6, 1e-9]), randn(4, 20, seed=1)),
    "a column of zeros": (randn(30, 4) * torch.tensor([1.0, 0.0, 1.0, 1.0]), randn(4, 20, seed=1)),
    "bf16": (randn(30, 4).bfloat16(), randn(4, 20, seed=1).bfloat16()),
}


@pytest.mark.parametrize(("b", "a"), FACTORS.values(), ids=FACTORS.keys())
def test_a_point_is_the_product_of_its_factors(b, a):
    point = point_from_factors(b, a, generator(9))
    assert relative(point.dense(), b.double() @ a.double()) < POINT_RTOL
    assert_orthonormal(point.u)
    assert_orthonormal(point.v)
    assert {part.dtype for part in point} == {torch.float32}


@pytest.mark.parametrize(("b", "a"), FACTORS.values(), ids=FACTORS.keys())
def test_the_core_holds_the_singular_values(b, a):
    s = point_from_factors(b, a, generator(9)).s.double()
    sigma = torch.linalg.svdvals(b.double() @ a.double())[: s.shape[0]]
    torch.testing.assert_close(s, torch.diag(sigma), rtol=POINT_RTOL, atol=1e-12 * float(sigma[0]))


def test_a_fresh_adapter_is_the_zero_matrix_and_keeps_the_subspace_of_its_a():
    a = randn(4, 20)
    point = point_from_factors(torch.zeros(30, 4), a, generator(9))
    assert not point.s.any()
    assert_orthonormal(point.u)
    v = point.v.double()
    assert relative(a.double() @ v @ v.mT, a) < POINT_RTOL


def test_two_zeros_make_a_point_too():
    point = point_from_factors(torch.zeros(30, 4), torch.zeros(4, 20), generator(9))
    assert not point.s.any()
    assert_orthonormal(point.u)
    assert_orthonormal(point.v)
