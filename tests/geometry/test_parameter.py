"""The record that joins two parameters and a core into one point."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qriemann.geometry import FixedRankParameter, FixedRankPoint, random_orthonormal
from qriemann.geometry.parameter import fixed_rank_parameters, orthonormality_drift


def make(m: int = 9, n: int = 7, rank: int = 3, seed: int = 0) -> FixedRankParameter:
    generator = torch.Generator().manual_seed(seed)
    u, v = (random_orthonormal(t, rank, generator) for t in (m, n))
    s = torch.randn(rank, rank, generator=generator)
    return FixedRankParameter("layer", nn.Parameter(u), nn.Parameter(v.mT.contiguous()), s)


def test_assign_moves_the_point_and_keeps_the_parameters():
    record, target = make(), make(seed=1).point()
    u, v_transposed = record.u, record.v_transposed
    record.assign(target)
    assert record.u is u
    assert record.v_transposed is v_transposed
    # The same float32 numbers, so the same float64 product.
    torch.testing.assert_close(record.point().dense(), target.dense(), rtol=1e-14, atol=1e-15)


def test_assign_takes_any_dtype_and_stores_float32():
    record, target = make(), make(seed=1).point()
    record.assign(FixedRankPoint(*(part.double() for part in target)))
    assert {part.dtype for part in record.point()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(record.point(), target, strict=True))


def test_the_point_follows_its_parameters():
    record = make()
    before = record.point().dense()
    with torch.no_grad():
        record.u.mul_(2)
        record.s.mul_(3)
    torch.testing.assert_close(record.point().dense(), 6 * before, rtol=1e-6, atol=0)


def test_a_cast_of_the_factors_is_undone_to_the_bit_also_after_a_step_in_place():
    record = make()
    record.follow()
    with torch.no_grad():
        record.u.mul_(1.5)
    expected = record.u.detach().clone(), record.v_transposed.detach().clone()
    for parameter in (record.u, record.v_transposed):
        parameter.data = parameter.data.bfloat16()
    record.follow()
    assert torch.equal(record.u, expected[0])
    assert torch.equal(record.v_transposed, expected[1])


def test_cast_factors_that_changed_are_rounded_with_a_warning(caplog):
    record = make()
    record.follow()
    record.u.data = 2 * record.u.data.bfloat16()
    expected = record.u.detach().float()
    record.follow()
    assert torch.equal(record.u, expected)
    assert "the factors of layer were cast to torch.bfloat16 and changed" in caplog.text


def test_points_are_found_once_in_the_order_of_their_first_parameter():
    first, second, other = make(), make(seed=1), nn.Parameter(torch.zeros(3))
    parameters = [other, second.v_transposed, first.u, second.u, first.v_transposed]
    assert fixed_rank_parameters(parameters) == [second, first]


@pytest.mark.parametrize("side", ["u", "v_transposed"])
def test_drift_is_the_worst_entry_over_all_points_and_both_sides(side):
    good, bad = make(), make(seed=1)
    with torch.no_grad():
        getattr(bad, side).mul_(1.01)
    # (1.01 U)^T (1.01 U) = 1.0201 I; rounding to float32 moves it by about 1e-7.
    assert orthonormality_drift([good, bad]) == pytest.approx(0.0201, abs=1e-6)
    assert orthonormality_drift([good]) < 1e-6
