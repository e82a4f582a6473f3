"""The whole step by kernels against the torch path in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.triton.layers import Layer, Maker, Options, Stepped, errors, torch_step
from tests.ops.triton.test_gram import assert_same_bits

EPS = 2**-24


def bound(truth: Layer, float32: dict[str, float], name: str) -> float:
    """What the kernels' error may be: four times the float32 torch path's, and the rounding of their own small matrices.

    The torch path takes the delicate parts in float64, the kernels take all in float32. 12 rounds of polar are 26 products
    of 2r x 2r matrices in a row; each leaves eps sqrt(2 r) relative to the largest singular value of what polar is taken
    of, errors of no common sign: eps sqrt(52 r). Polar divides that by the smallest, about a quarter in these tests.
    The new singular subspaces are off by as much over the gap at zero, sigma_r / sigma_1, which X does not see but the
    momentum's projection does. Directions that are missing from S have no gap: the old ones fill in.
    """
    rank = truth.s.shape[0]
    own = 4 * EPS * (52 * rank) ** 0.5
    if name != "x":
        sigma = torch.linalg.svdvals(truth.s)
        own *= (sigma[0] / sigma[sigma > 1e-5 * sigma[0]].min()).item() if sigma[0] > 0 else 1
    return 4 * float32[name] + own


def assert_accurate(layer: Layer, stepped: Layer, options: Options) -> None:
    truth, float32 = torch_step(layer, options), torch_step(layer, options, torch.float32)
    found, reference = errors(stepped.to(torch.device("cpu")), truth, options), errors(float32, truth, options)
    for name, error in found.items():
        assert error <= bound(truth, reference, name), f"{name}: {error:.1e} against {reference[name]:.1e} of float32"
    # `apply` corrects above 2e-6, and float32 rounding adds some 1e-7.
    assert stepped.drift < 2.5e-6


def check(layer: Layer, options: Options, device: torch.device) -> Layer:
    stepped = Stepped([layer], device)
    after = stepped.step(options)[0]
    assert stepped.kernels.moved.tolist() == [1]
    assert_accurate(layer, after, options)
    return after


SHAPES = [(1, 1, 1), (31, 7, 1), (7, 129, 3), (65, 33, 8), (8, 8, 8), (16, 257, 16), (33, 20, 16)]
SLOW_SHAPES = [(65, 129, 33), (257, 1025, 16), (129, 200, 64), (128, 160, 65), (257, 300, 128)]


@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_step_agrees_with_float64_on_odd_shapes(m, n, rank, device):
    check(Maker(rank).layer(m, n, rank), Options(), device)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "rank"), SLOW_SHAPES)
@pytest.mark.parametrize("smallest", [0.1, 1.0])
def test_step_agrees_with_float64_at_high_rank(m, n, rank, smallest, device):
    # Not from zero: there 2 r singular values compete and the r-th nearly ties with the next, over whose gap rounding is
    # divided. `test_retraction_is_as_near_as_the_truncated_svd` is about those.
    maker = Maker(rank)
    check(maker.layer(m, n, rank, maker.graded(rank, smallest)), Options(), device)


@pytest.mark.parametrize(
    "options",
    [
        Options(nesterov=True),
        Options(momentum_form="orthogonalized"),
        Options(tangent_iterations=3),
        Options(nesterov=True, momentum_form="orthogonalized", tangent_iterations=2),
        Options(lr=0.0),
    ],
)
def test_every_form_of_the_step_agrees_with_float64(options, device):
    check(Maker(4).layer(40, 30, 5), options, device)


@pytest.mark.parametrize(("smallest", "lr"), [(0.0, 1e-2), (1e-2, 1e-2), (1e-6, 1e-3), (1e-12, 1e-3)])
def test_an_ill_conditioned_or_zero_core_is_an_ordinary_point(smallest, lr, device):
    maker = Maker(5)
    s = maker.graded(6, smallest) if smallest else torch.zeros(6, 6, dtype=torch.float64)
    check(maker.layer(40, 30, 6, s), Options(lr=lr), device)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_step_does_not_depend_on_the_gradients_scale(scale, device):
    layer = Maker(6).layer(40, 30, 5)
    for name in ("grad_u", "grad_v", "m_u", "m_v"):
        setattr(layer, name, scale * getattr(layer, name))
    check(layer, Options(), device)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_rank_deficient_gradients_agree_with_float64(rank, start, device):
    check(Maker(7).layer(40, 30, 5, start * torch.eye(5).double(), momentum=False, rank=rank), Options(), device)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_zero_gradient_with_zero_momentum_only_decays(start, device):
    layer = Maker(8).layer(40, 30, 5, start * torch.eye(5).double(), momentum=False)
    layer.grad_u.zero_()
    layer.grad_v.zero_()
    after = Stepped([layer], device).step(Options())[0].to(torch.device("cpu"))
    torch.testing.assert_close(after.x, (1 - 0.01 * 0.1) * layer.x, rtol=1e-6, atol=1e-7)
    assert (after.m_u == 0).all()
    assert (after.m_v == 0).all()


def test_gradients_in_the_span_of_the_point_invent_no_directions(device):
    layer = Maker(9).layer(40, 30, 5, momentum=False)
    core = Maker(9).graded(5, 0.5).float()
    layer.grad_u, layer.grad_v = layer.u @ core, layer.v @ core.mT
    after = check(layer, Options(), device).to(torch.device("cpu"))
    inside = layer.u.double() @ (layer.u.double().mT @ after.u.double())
    assert (after.u - inside).abs().max() < 1e-6


def test_a_drifted_factor_is_made_orthonormal_and_keeps_its_point(device):
    layer = Maker(10).layer(40, 30, 5)
    skew = torch.eye(5) + 3e-4 * Maker(11).randn(5, 5).float()
    layer.u, layer.v = layer.u @ skew, layer.v @ skew
    options = Options()
    stepped = Stepped([layer], device)
    after = stepped.step(options)[0].to(torch.device("cpu"))
    truth = torch_step(layer, options)
    # E is about 1e-3, so what the second-order formula leaves is of the size of its cube.
    assert after.drift < 1e-6
    assert torch.linalg.norm(after.x - truth.x) < 1e-6 * torch.linalg.norm(truth.x)


def mixed_batch() -> list[Layer]:
    maker = Maker(12)
    return [maker.layer(m, n, 3) for m, n in ((33, 7), (7, 65), (129, 33), (12, 12))]


def test_a_layer_with_a_nan_gradient_is_left_to_the_bit_and_counted(device):
    layers = mixed_batch()
    layers[1].grad_v[3, 1] = torch.nan
    layers[2].grad_u[100, 0] = torch.inf
    stepped = Stepped(layers, device)
    stepped.step(Options())
    assert stepped.kernels.moved.tolist() == [1, 0, 0, 1]
    assert stepped.skipped.item() == 2
    for index in (0, 3):
        assert_accurate(layers[index], stepped.layers[index], Options())
    for index in (1, 2):
        for name in ("u", "v", "s", "m_u", "m_v"):
            assert torch.equal(getattr(stepped.layers[index], name).cpu(), getattr(layers[index], name))


def test_a_layer_without_gradients_keeps_everything_and_is_not_counted(device):
    layers = mixed_batch()
    stepped = Stepped(layers, device)
    grads = stepped.grads
    # One missing side is enough.
    grads[1], grads[4 + 2] = None, None
    stepped.step(Options(), grads)
    assert stepped.kernels.moved.tolist() == [1, 0, 0, 1]
    assert stepped.skipped.item() == 0
    for index in (1, 2):
        assert_same_bits(stepped.layers[index].to(torch.device("cpu")), layers[index])


def test_layers_take_their_own_learning_rate_decay_and_momentum(device):
    layers = mixed_batch()[:2]
    stepped = Stepped(layers, device)
    vectors = [torch.tensor(pair, device=device) for pair in ((0.01, 0.03), (0.5, 0.0), (0.0, 0.95))]
    stepped.kernels.step(stepped.grads, *vectors)
    for index, layer in enumerate(layers):
        options = Options(*(vector[index].item() for vector in vectors))
        assert_accurate(layer, stepped.layers[index], options)


def test_the_same_inputs_give_the_same_bits_alone_and_in_company(device):
    layers = mixed_batch()
    first, second, alone = Stepped(layers, device), Stepped(layers, device), Stepped(layers[2:3], device)
    for stepped in (first, second, alone):
        stepped.step(Options())
    for one, other in zip(first.layers, second.layers, strict=True):
        assert_same_bits(one, other)
    assert_same_bits(first.layers[2], alone.layers[0])


def test_gradients_at_new_addresses_are_found(device):
    layer = Maker(13).layer(33, 20, 3)
    moving, resting = Stepped([layer], device), Stepped([layer], device)
    for _ in range(2):
        moving.step(Options(), [grad.clone() for grad in moving.grads])
        resting.step(Options())
    assert_same_bits(moving.layers[0], resting.layers[0])


def run_on_a_quadratic(steps: int, device: torch.device) -> None:
    """From S = 0 with noisy gradients, then gradients of rank one, then none at all."""
    maker, options = Maker(14), Options(lr=0.02, weight_decay=0.0)
    layer = maker.layer(23, 17, 3, torch.zeros(3, 3, dtype=torch.float64), momentum=False)
    target = maker.randn(23, 3) @ maker.randn(3, 17)
    stepped = Stepped([layer], device)
    for step in range(steps):
        now = stepped.layers[0]
        x, u, v = now.x.cpu(), now.u.double().cpu(), now.v.double().cpu()
        g = x - target + 0.1 * maker.randn(23, 17)
        if step >= steps // 2:
            g = maker.randn(23, 1) @ maker.randn(1, 17) if step < 3 * steps // 4 else torch.zeros(23, 17).double()
        now.grad_u.copy_(g @ v)
        now.grad_v.copy_(g.mT @ u)
        if step == steps - 1:
            now.m_u.zero_()
            now.m_v.zero_()
        stepped.step(replace(options, nesterov=step % 2 == 1))
        assert now.drift < 1e-5
        assert all(value.isfinite().all() for value in vars(now).values())
    assert stepped.skipped.item() == 0


def test_twelve_steps_stay_on_the_manifold(device):
    run_on_a_quadratic(12, device)


@pytest.mark.slow
def test_two_hundred_steps_stay_on_the_manifold(device):
    run_on_a_quadratic(200, device)
