"""The optimizer on the kernels: no read of the device on the way, and the same step as the batched path."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qriemann.geometry import FixedRankParameter, random_orthonormal
from qriemann.optim import Riemannion
from tests.ops.triton.layers import Maker

# What torch calls when Python asks for a value, or for a shape that depends on one.
_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "_linalg_svd")


class NoReads(TorchDispatchMode):
    """Refuses every operation that waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in _READS, name
        assert name != "_to_copy" or (kwargs or {}).get("device") is None, "copied to another device"
        return func(*args, **(kwargs or {}))


def points(device: torch.device, shapes=((33, 20), (20, 47)), rank: int = 3) -> list[FixedRankParameter]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for m, n in shapes:
        u, v = (random_orthonormal(t, rank, generator).to(device) for t in (m, n))
        found.append(FixedRankParameter("layer", nn.Parameter(u), nn.Parameter(v.mT), torch.eye(rank, device=device)))
    return found


def set_gradients(records: list[FixedRankParameter], seed: int) -> None:
    maker = Maker(seed)
    for record in records:
        for parameter in (record.u, record.v_transposed):
            parameter.grad = maker.randn(*parameter.shape).float().to(parameter.device)


def parameters(records: list[FixedRankParameter]) -> list[nn.Parameter]:
    return [p for record in records for p in (record.u, record.v_transposed)]


def test_a_capturable_step_reads_nothing_from_the_device(device):
    records = points(device)
    optimizer = Riemannion(parameters(records), lr=torch.tensor(0.02, device=device), capturable=True)
    set_gradients(records, 0)
    optimizer.step()
    set_gradients(records, 1)
    before = records[0].u.data.clone()
    with NoReads():
        optimizer.step()
    assert (records[0].u.data - before).norm() > 1e-3


def test_the_batched_path_does_read_so_the_test_above_can_fail(device):
    records = points(device)
    optimizer = Riemannion(parameters(records), lr=0.02)
    set_gradients(records, 0)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        optimizer.step()


def test_a_capturable_optimizer_follows_the_batched_one(device):
    kernels, batched = points(device), points(device)
    optimizers = Riemannion(parameters(kernels), lr=0.02, capturable=True), Riemannion(parameters(batched), lr=0.02)
    for seed in range(3):
        for records, optimizer in zip((kernels, batched), optimizers, strict=True):
            maker = Maker(seed)
            for record in records:
                # Blocks of one gradient: the two may turn their bases differently.
                u, _, v = record.point()
                gradient = maker.randn(len(u), len(v)).float().to(device)
                record.u.grad, record.v_transposed.grad = gradient @ v, (gradient.mT @ u).mT
            optimizer.step()
    for one, other in zip(kernels, batched, strict=True):
        x, y = one.point().dense(), other.point().dense()
        assert (x - y).norm() < 1e-5 * y.norm()


@pytest.mark.gpu
def test_a_captured_step_of_the_optimizer_gives_the_bits_of_an_eager_one(device):
    eager, captured = points(device), points(device)
    rates = [torch.tensor(0.02, device=device) for _ in range(2)]
    optimizers = [
        Riemannion(parameters(records), lr=rate, capturable=True)
        for records, rate in zip((eager, captured), rates, strict=True)
    ]
    for records, optimizer in zip((eager, captured), optimizers, strict=True):
        set_gradients(records, 0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    # Captured, not run.
    with torch.cuda.graph(graph):
        optimizers[1].step()
    for seed in range(1, 5):
        maker = Maker(seed)
        for one, other in zip(parameters(eager), parameters(captured), strict=True):
            fresh = maker.randn(*one.shape).float().to(device)
            one.grad.copy_(fresh)
            other.grad.copy_(fresh)
        for rate in rates:
            rate.fill_(0.01 * seed)
        optimizers[0].step()
        graph.replay()
    for one, other in zip(eager, captured, strict=True):
        assert torch.equal(one.point().dense(), other.point().dense())
