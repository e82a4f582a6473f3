"""What only a CUDA device can show: no synchronization, capture, and equality of captured and eager steps."""

from __future__ import annotations

import pytest
import torch

from tests.ops.triton.layers import Maker, Options, Stepped
from tests.ops.triton.test_gram import assert_same_bits
from tests.ops.triton.test_step import assert_accurate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rank", [1, 8, 16, 33, 64, 128])
@pytest.mark.parametrize("smallest", [0.1, 1.0])
def test_a_batch_of_layers_agrees_with_float64(rank, smallest, device):
    maker, options = Maker(rank), Options()
    shapes = [(576, 192), (1536, 576), (4097, 257), (rank, 2 * rank + 1)]
    layers = [maker.layer(max(m, rank), max(n, rank), rank, maker.graded(rank, smallest)) for m, n in shapes]
    stepped = Stepped(layers, device)
    for layer, after in zip(layers, stepped.step(options), strict=True):
        assert_accurate(layer, after, options)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rank", [16, 64])
def test_a_step_never_waits_for_the_device(rank, nesterov, device):
    maker = Maker(rank)
    stepped = Stepped([maker.layer(300, 200, rank), maker.layer(100, 500, rank)], device)
    options = Options(nesterov=nesterov)
    stepped.step(options)
    vectors = [torch.full((2,), value, device=device) for value in (0.01, 0.1, 0.9)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepped.kernels.step([grad.clone() for grad in stepped.grads], *vectors, nesterov=nesterov)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rank", [16, 64])
def test_captured_and_eager_steps_give_the_same_bits(rank, device):
    maker = Maker(rank)
    layers = [maker.layer(300, 200, rank), maker.layer(100, 500, rank)]
    eager, captured = Stepped(layers, device), Stepped(layers, device)
    vectors = [torch.full((2,), value, device=device) for value in (0.01, 0.1, 0.9)]
    grads = captured.grads
    # The first step compiles, and both take it.
    eager.kernels.step(eager.grads, *vectors)
    captured.kernels.step(grads, *vectors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.kernels.step(grads, *vectors)
    for step in range(5):
        for one, other in zip(eager.grads, grads, strict=True):
            fresh = torch.randn(one.shape, generator=torch.Generator().manual_seed(step)).to(device)
            one.copy_(fresh)
            other.copy_(fresh)
        vectors[0].fill_(0.01 * (step + 1))
        eager.kernels.step(eager.grads, *vectors)
        graph.replay()
    for one, other in zip(eager.layers, captured.layers, strict=True):
        assert_same_bits(one, other)
