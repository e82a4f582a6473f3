"""The record that joins two parameters and a core into one point."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from qriemann.geometry import FixedRankParameter, FixedRankPoint, random_orthonormal
from qriemann.geometry.parameter import fixed_rank_parameters, orthonormality_drift


def make(m: int = 9, n: int = 7, rank: int = 3, seed: int = 0) -> FixedRankParameter:
    generator = torch.Generator().manual_seed(seed)
    u, v = (random_orthonormal(t, rank, generator) for t in (m, n))
    s = torch.randn(rank, rank, generator=generator)
    return FixedRankParameter("layer", nn.Parameter(u), nn.Parameter(v.mT.contiguous()), s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assign_moves_the_point_keeps_the_parameters_and_stores_float32(dtype):
    record, target = make(), make(seed=1).point()
    u, v_transposed = record.u, record.v_transposed
    record.assign(FixedRankPoint(*(part.to(dtype) for part in target)))
    assert record.u is u
    assert record.v_transposed is v_transposed
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


def make_with_offset() -> FixedRankParameter:
    record = make()
    record.offset = FixedRankPoint(*(part.clone() for part in make(seed=5).point()))
    return record


def product(record: FixedRankParameter, scaling: float = 2.0) -> Tensor:
    """s (X - X_0) as a layer multiplies by it."""
    bases = record.operands(scaling, torch.float32)
    return bases.u[:, record.rank :].double() @ bases.v.double().mT


def dense(record: FixedRankParameter, scaling: float = 2.0) -> Tensor:
    return scaling * (record.point().dense() - (0 if record.offset is None else record.offset.dense()))


def written_by_a_buffer(record: FixedRankParameter) -> Callable[[], None]:
    """As the optimizers gather factors: in a buffer that is written where the parameter does not see it."""
    buffer = torch.stack([record.u.data, record.u.data])
    record.u.data = buffer[1]
    return lambda: buffer.mul_(3)


def written_by_an_older_alias(record: FixedRankParameter) -> Callable[[], None]:
    row = record.v_transposed.data[1]
    return lambda: row.zero_()


def assigned_twice(record: FixedRankParameter) -> Callable[[], None]:
    """The second tensor may lie where the first of all did."""

    def write() -> None:
        record.u.data = torch.ones_like(record.u)
        record.u.data = torch.full_like(record.u, 2.0)

    return write


def loaded(record: FixedRankParameter) -> Callable[[], None]:
    layer = nn.Linear(7, 3, bias=False)
    layer.weight = record.v_transposed
    return lambda: layer.load_state_dict({"weight": torch.ones(3, 7)})


def moved_by_sgd(record: FixedRankParameter) -> Callable[[], None]:
    optimizer = torch.optim.SGD([record.u, record.v_transposed], lr=0.1)
    record.u.grad, record.v_transposed.grad = torch.ones_like(record.u), torch.ones_like(record.v_transposed)
    return optimizer.step


# Each is called with a point and prepares a write, which is called without an argument.
WRITES: dict[str, Callable[[FixedRankParameter], Callable[[], object]]] = {
    "U in place": lambda p: lambda: p.u.mul_(2),
    "V in place through a view": lambda p: lambda: p.v_transposed.mT[0].zero_(),
    "U's data in place": lambda p: lambda: p.u.data.mul_(2),
    "V's data replaced": lambda p: lambda: setattr(p.v_transposed, "data", torch.ones_like(p.v_transposed)),
    "U's data replaced twice": assigned_twice,
    "an older alias of V's data": written_by_an_older_alias,
    "a buffer that U is a view of": written_by_a_buffer,
    "a state dict": loaded,
    "torch's SGD": moved_by_sgd,
    "S in place": lambda p: lambda: p.s.mul_(2),
    "S's data in place": lambda p: lambda: p.s.data.zero_(),
    "S replaced": lambda p: lambda: setattr(p, "s", torch.ones(3, 3)),
    "another offset": lambda p: lambda: setattr(p, "offset", make(seed=8).point()),
    "no offset": lambda p: lambda: setattr(p, "offset", None),
    "the offset in place": lambda p: lambda: p.offset.v.mul_(2),
    "assign": lambda p: lambda: p.assign(make(seed=7).point()),
    "foreach": lambda p: lambda: torch._foreach_mul_([p.u, p.v_transposed, p.s], 2),
    "a product's out": lambda p: lambda: torch.matmul(torch.ones(3, 3), torch.ones(3, 3), out=p.s.detach()),
    "a cast that rounds": lambda p: lambda: setattr(p.u, "data", 3 * p.u.data.bfloat16()),
    "a kernel that reports": lambda p: lambda: (p.u.detach().numpy().fill(1), increment_version(p.u)),
}


@pytest.mark.parametrize("prepare", WRITES.values(), ids=WRITES.keys())
@torch.no_grad()
def test_what_a_layer_multiplies_by_follows_every_write(prepare):
    record = make_with_offset()
    write = prepare(record)
    before = product(record)
    torch.testing.assert_close(before, dense(record), rtol=1e-6, atol=1e-6)
    write()
    after = product(record)
    torch.testing.assert_close(after, dense(record), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after, before, rtol=1e-2)


def test_between_two_writes_the_bases_are_made_once():
    record = make_with_offset()
    first = record.operands(2.0, torch.bfloat16)
    assert record.operands(2.0, torch.bfloat16) is first
    # What the point's own state, its optimizer or a save reads is not a write.
    record.point(), record.u.data.norm(), record.follow(), orthonormality_drift([record])
    assert record.operands(2.0, torch.bfloat16) is first
    with torch.inference_mode():
        assert record.operands(2.0, torch.bfloat16) is first


def test_bases_that_are_made_in_inference_mode_can_be_trained_with():
    record = make()
    with torch.inference_mode():
        bases = record.operands(1.0, torch.float32)
    assert not any(part.is_inference() for part in bases[:2])


def test_a_point_whose_writes_torch_does_not_count_is_folded_every_time():
    with torch.inference_mode():
        record = make()
        before = product(record)
        record.u.mul_(2)
        assert torch.equal(product(record), 2 * before)


def test_a_copy_has_bases_of_its_own():
    record = make_with_offset()
    product(record)
    copied = copy.deepcopy(record)
    with torch.no_grad():
        record.u.mul_(2)
        torch.testing.assert_close(product(copied), dense(copied), rtol=1e-6, atol=1e-6)
        copied.s.data.mul_(3)
        torch.testing.assert_close(product(copied), dense(copied), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(product(record), dense(record), rtol=1e-6, atol=1e-6)
