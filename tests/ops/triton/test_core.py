"""The parts of `core` by themselves: polar's band, bases of degenerate columns, and how good the truncation is."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qriemann.ops import POLAR_RTOL
from qriemann.ops.factor import PIVOT_TOL
from qriemann.ops.polar import _COEFFICIENTS
from qriemann.ops.triton.core import _polar
from qriemann.ops.triton.factor import factor_gram, orthonormalize
from tests.dense import polar, tangent_projection
from tests.ops.triton.layers import Maker, Options, Stepped, replace


@triton.jit
def polar_kernel(k, work, coefficients, PADDED: tl.constexpr, STEPS: tl.constexpr):  # noqa: N803
    _polar(k, work, coefficients, PADDED, 16, STEPS)


@triton.jit
def factor_kernel(r, inverse, gram, length, tolerance, RANK: tl.constexpr, PADDED: tl.constexpr):  # noqa: N803
    factor_gram(r, inverse, gram, length, tolerance, RANK, PADDED)


@triton.jit
def basis_kernel(q, a, scratch, floor, RANK: tl.constexpr, PADDED: tl.constexpr):  # noqa: N803
    orthonormalize(q, a, scratch, floor, RANK, PADDED, 16)


def padded(matrix: Tensor, rows: int, columns: int, device: torch.device) -> Tensor:
    out = torch.zeros(rows, columns, device=device)
    out[: matrix.shape[0], : matrix.shape[1]] = matrix
    return out


def polar_of(k: Tensor, device: torch.device) -> Tensor:
    size = max(16, triton.next_power_of_2(k.shape[0] // 2))
    work = torch.empty(3 * 4 * size**2, device=device)
    coefficients = torch.tensor([(a, b) for _, a, b in _COEFFICIENTS], device=device)
    out = padded(k, 2 * size, 2 * size, device)
    polar_kernel[(1,)](out, work, coefficients, size, len(_COEFFICIENTS))
    return out[: k.shape[0], : k.shape[0]].cpu().double()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_polar_takes_singular_values_above_the_band_to_one_and_noise_to_zero(scale, device):
    maker, size = Maker(1), 20
    left, right = maker.orthonormal(size, size), maker.orthonormal(size, size)
    sigma = torch.tensor([*torch.logspace(0, -2, 12), 4e-3, 2e-5, 1e-5, 1e-6, 1e-7, 0, 0, 0], dtype=torch.float64)
    o = polar_of(scale * (left * sigma) @ right.mT, device)
    found = (left.mT @ o @ right).diagonal()
    # Float32 blurs a direction of relative size sigma by eps / sigma, 1.5e-5 for the smallest above the band; noise of 2e-5
    # is lifted to at most 1e-3 by the cubics and pushed down by the quintic.
    torch.testing.assert_close(found[:13], torch.ones(13).double(), rtol=0, atol=1e-4)
    assert found[13:].abs().max() < 1e-3
    assert torch.linalg.matrix_norm(o, 2) < 1 + 1e-5


def test_the_cut_off_of_polar_lies_about_polar_rtol(device):
    maker, size = Maker(2), 32
    left, right = maker.orthonormal(size, size), maker.orthonormal(size, size)
    for factor, low, high in ((3, 0.99, 1.001), (0.1, 0.0, 0.05)):
        sigma = torch.cat([torch.linspace(1, 0.3, size - 1), torch.tensor([factor * POLAR_RTOL])]).double()
        o = polar_of((left * sigma) @ right.mT, device)
        assert low <= (left.mT @ o @ right)[-1, -1] <= high


@pytest.mark.parametrize(("rank", "null"), [(1, 0), (5, 0), (16, 3), (7, 7), (20, 4)])
def test_factor_gram_gives_orthonormal_columns_and_drops_null_directions(rank, null, device):
    maker, size = Maker(rank), max(16, triton.next_power_of_2(rank))
    a = maker.randn(50, rank - null) @ maker.randn(rank - null, rank) * torch.logspace(0, -6, rank).double()
    length = a.norm(dim=0)
    r, inverse = (torch.empty(size, size, device=device) for _ in range(2))
    gram = padded(a.mT @ a, size, size, device)
    factor_kernel[(1,)](r, inverse, gram, padded(length[None], 1, size, device), PIVOT_TOL, rank, size)
    assert (r[rank:] == 0).all()
    assert (r[:, rank:] == 0).all()
    r, inverse = (value[:rank, :rank].cpu().double() for value in (r, inverse))
    q = a @ inverse
    kept = rank - null
    assert ((r != 0).any(1).sum() <= kept) or null == 0
    assert (q[:, (r == 0).all(1)] == 0).all()
    kept_columns = q[:, (r != 0).any(1)]
    # A pivot just above the tolerance carries an error of eps over it.
    eye = torch.eye(kept_columns.shape[1], dtype=torch.float64)
    assert (kept_columns.mT @ kept_columns - eye).abs().max() < 4 * 2**-24 / PIVOT_TOL if kept else True
    # What is dropped is shorter than sqrt(PIVOT_TOL) of its column.
    assert ((q @ r - a).norm(dim=0) <= 2 * PIVOT_TOL**0.5 * length).all()


@pytest.mark.parametrize(
    ("rank", "smallest"), [(1, 1.0), (5, 1e-3), (16, 1e-12), pytest.param(33, 1e-12, marks=pytest.mark.slow)]
)
def test_gram_schmidt_is_orthonormal_whatever_the_conditioning(rank, smallest, device):
    columns = Maker(rank).orthonormal(2 * rank, rank) @ Maker(rank + 1).graded(rank, smallest)
    q, a = orthonormalized(columns, rank, device)
    # Twice is enough: a few eps an entry.
    assert (q.mT @ q - torch.eye(rank)).abs().max() < 1e-6
    assert (a - q @ (q.mT @ a)).norm() < 3e-6 * a.norm()


@pytest.mark.parametrize(("rank", "columns"), [(5, 0), (5, 2), (16, 3), pytest.param(40, 17, marks=pytest.mark.slow)])
def test_missing_directions_come_from_the_old_factor(rank, columns, device):
    maker = Maker(rank)
    a = maker.randn(2 * rank, columns) @ maker.randn(columns, rank) / rank
    # Directions that were dropped: their coordinates must stay empty.
    a[rank + columns :] = 0
    q, a = orthonormalized(a, rank, device)
    assert (q.mT @ q - torch.eye(rank)).abs().max() < 1e-6
    assert (a - q @ (q.mT @ a)).norm() <= 3e-6 * a.norm()
    assert (q[rank + columns :] == 0).all()
    # All of the filling lies in the old factor and the columns: nothing else.
    old = torch.cat([torch.eye(2 * rank, dtype=torch.float64)[:, :rank], a], 1)
    basis, sigma, _ = torch.linalg.svd(old)
    basis = basis[:, : int((sigma > 1e-5).sum())]
    assert (q - basis @ (basis.mT @ q)).norm() < 1e-5


def orthonormalized(a: Tensor, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    size = max(16, triton.next_power_of_2(rank))
    source = torch.zeros(2, size, size, device=device)
    source[0, :rank, :rank], source[1, :rank, :rank] = a[:rank], a[rank:]
    q, scratch = torch.empty(2, size, size, device=device), torch.empty(size, 16, device=device)
    floor = 1e-6 * max(a.norm().item(), 1e-30)
    basis_kernel[(1,)](q, source, scratch, floor, rank, size)
    assert (q[:, rank:] == 0).all()
    assert (q[:, :, rank:] == 0).all()
    pick = torch.cat([q[0, :rank, :rank], q[1, :rank, :rank]]).cpu().double()
    return pick, torch.cat([source[0, :rank, :rank], source[1, :rank, :rank]]).cpu().double()


@pytest.mark.parametrize(
    ("start", "lr"),
    [("zero", 1e-2), ("one", 1e-2), ("one", 0.3), ("mixed", 1e-1), ("mixed", 1e-2), ("mixed", 1e-3)],
)
@pytest.mark.parametrize("rank", [6, pytest.param(16, marks=pytest.mark.slow)])
def test_retraction_is_as_near_as_the_truncated_svd(start, lr, rank, device):
    maker, options = Maker(20 + rank), Options(lr=lr, weight_decay=0.0)
    eye = torch.eye(rank, dtype=torch.float64)
    s = {"zero": 0 * eye, "one": eye, "mixed": maker.graded(rank, 1e-4)}[start]
    layer = maker.layer(3 * rank, 4 * rank, rank, s, momentum=False)
    u, v = layer.u.double(), layer.v.double()
    # An ambient gradient of full rank, whose tangent part has its singular values spread out.
    g = maker.randn(3 * rank, 4 * rank)
    layer = replace(layer, grad_u=(g @ v).float(), grad_v=(g.mT @ u).float())
    after = Stepped([layer], device).step(options)[0].to(torch.device("cpu"))
    direction = tangent_projection(polar(tangent_projection(g, u, v), POLAR_RTOL), u, v)
    y = layer.x - lr * direction
    best = torch.linalg.svdvals(y)[rank:].norm()
    assert (y - after.x).norm() <= (1 + 1e-4) * best + 1e-6 * layer.x.norm()
