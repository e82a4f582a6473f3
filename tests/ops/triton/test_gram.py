"""The first tall pass by itself: every chunk, part and stride layout against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.triton.layers import Layer, Maker, Options, Stepped


def gram_of(stepped: Stepped, options: Options, side: int) -> Tensor:
    """The Gram blocks of one side as `core` would add them up, in float64 and without padding."""
    kernels, rank = stepped.kernels, stepped.s.shape[-1]
    blocks = 4 if options.nesterov else 2
    partials = kernels._partials.view(kernels._tiles.shape[0], blocks, kernels.padded, kernels.padded)
    chunks = partials[kernels._tiles[:, 0] == side].double().sum(0)
    assert (chunks[:, rank:] == 0).all()
    assert (chunks[:, :, rank:] == 0).all()
    return chunks[:, :rank, :rank]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "rank"), [(1, 1, 1), (7, 31, 3), (33, 65, 16), (129, 257, 8), (1025, 40, 3), (70, 35, 33), (70, 130, 65)]
)
def test_gram_blocks_agree_with_float64(m, n, rank, nesterov, device):
    layer = Maker(rank).layer(m, n, rank)
    options = Options(nesterov=nesterov)
    stepped = Stepped([layer], device)
    stepped.kernels._gram(stepped.grads, torch.tensor([options.momentum], device=device), nesterov=nesterov)
    for side, (factor, momentum, grad) in enumerate(
        ((layer.u, layer.m_u, layer.grad_u), (layer.v, layer.m_v, layer.grad_v))
    ):
        u, carried = factor.double(), options.momentum * momentum.double() + grad.double()
        ahead = options.momentum * carried + grad.double()
        pairs = [(u, carried), (carried, carried)]
        if nesterov:
            pairs = [(u, carried), (u, ahead), (carried, ahead), (ahead, ahead)]
        for found, (left, right) in zip(gram_of(stepped, options, side), pairs, strict=True):
            # A float32 sum of t products is off by at most t eps times the product of the columns' norms; the momentum's
            # own rounding adds 3 eps. Rounding errors cancel: a tenth of t, and never less than 8.
            scale = left.norm(dim=0)[:, None] * right.norm(dim=0)[None, :]
            tolerance = 2**-24 * max(8, left.shape[0] / 10) * scale
            assert ((found.cpu() - left.mT @ right).abs() <= tolerance).all()


@pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
def test_gradients_of_any_strides_give_the_same_bits(layout, device):
    layer = Maker(1).layer(33, 65, 5)
    plain = Stepped([layer], device)
    plain.step(Options(), [layer.grad_u.to(device), layer.grad_v.mT.contiguous().to(device)])

    def laid_out(grad: Tensor) -> Tensor:
        grad = grad.to(device)
        if layout == "rows":
            return grad.contiguous()
        if layout == "columns":
            return grad.mT.contiguous().mT
        wide = torch.full((2 * grad.shape[0], 3 * grad.shape[1]), torch.nan, device=device)
        view = wide[::2, 1::3]
        return view.copy_(grad)

    strided = Stepped([layer], device)
    strided.step(Options(), [laid_out(layer.grad_u), laid_out(layer.grad_v.mT)])
    assert_same_bits(plain.layers[0], strided.layers[0])


def assert_same_bits(first: Layer, second: Layer) -> None:
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(second, name)), name
