"""One step of the optimizer against a dense float64 computation of the same step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qriemann.geometry import FixedRankParameter, FixedRankPoint, random_orthonormal
from qriemann.ops import POLAR_RTOL
from qriemann.optim import Riemannion, RiemannLoRA
from tests.dense import DenseRiemannion, polar, tangent_projection
from tests.models import relative

# Float32 factors hold X to 6e-8 sqrt(r) relative; a step adds two tall products.
STEP_RTOL = 1e-5


class Adapter:
    """One trainable point with a loss in X."""

    def __init__(self, m: int, n: int, rank: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        u, v = (random_orthonormal(t, rank, self.generator) for t in (m, n))
        self.record = FixedRankParameter("layer", nn.Parameter(u), nn.Parameter(v.mT), torch.zeros(rank, rank))
        self.shape = (m, n)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.record.u, self.record.v_transposed]

    def start_at(self, s: Tensor) -> None:
        self.record.assign(FixedRankPoint(self.record.u.data, s, self.record.v_transposed.data.mT))

    @property
    def x(self) -> Tensor:
        return self.record.point().dense()

    def set_gradient(self, g: Tensor) -> None:
        """Leaves the blocks as the layer's backward does, from the dense gradient."""
        point = self.record.point()
        self.record.u.grad = (g.double() @ point.v.double()).float()
        self.record.v_transposed.grad = (g.double().mT @ point.u.double()).float().mT

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def follow(
    adapter: Adapter,
    gradients: Callable[[Adapter], Tensor],
    steps: int = 50,
    lr: float = 0.01,
    momentum: float = 0.9,
    *,
    method: type = Riemannion,
    truth: type = DenseRiemannion,
    rtol: float = POLAR_RTOL,
    **options,
) -> float:
    """The worst relative distance to the dense trajectory over the steps; every value is checked to be finite."""
    dense = truth(adapter.x, adapter.record.u.data, adapter.record.v_transposed.data.mT, rtol)
    optimizer = method(adapter.parameters, lr=lr, momentum=momentum, **options)
    worst = 0.0
    for _ in range(steps):
        g = gradients(adapter)
        adapter.set_gradient(g)
        optimizer.step()
        dense.step(g, lr, momentum, **options)
        assert all(p.isfinite().all() for p in adapter.parameters)
        worst = max(worst, relative(adapter.x, dense.x))
    assert optimizer.orthonormality_drift() < 1e-5
    return worst


def noisy_quadratic(scale: float = 1.0):
    """Gradients X - target + noise of full rank, well conditioned: nothing lies near the cut-off.

    The target leans on the starting bases. Without that the first step from S = 0 keeps r of 2 r directions whose singular
    values nearly tie, and rounding is divided by their gap; `test_a_near_tie_is_cut_at_the_best_distance` is about those.
    """

    def gradients(adapter: Adapter) -> Tensor:
        if not hasattr(adapter, "target"):
            u, s, v = adapter.record.point()
            spectrum = torch.linspace(2, 1, s.shape[0], dtype=torch.float64)
            adapter.target = adapter.randn(*adapter.shape) + 5 * u.double() @ torch.diag(spectrum) @ v.double().mT
        return scale * (adapter.x - adapter.target + adapter.randn(*adapter.shape))

    return gradients


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize(
    ("m", "n", "rank"), [(30, 20, 4), (20, 30, 3), (97, 65, 16), (33, 17, 1), (24, 8, 8), (12, 12, 12)]
)
def test_fifty_steps_follow_the_dense_computation(m, n, rank, start):
    adapter = Adapter(m, n, rank)
    if start == "random":
        adapter.start_at(adapter.randn(rank, rank).float() + 3 * torch.eye(rank))
    assert follow(adapter, noisy_quadratic()) < STEP_RTOL


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_step_does_not_depend_on_the_gradients_scale(scale):
    assert follow(Adapter(30, 20, 4), noisy_quadratic(scale)) < STEP_RTOL


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_zero_gradient_moves_nothing(start):
    adapter = Adapter(30, 20, 4)
    adapter.start_at(start * torch.eye(4))
    before = adapter.x
    follow(adapter, lambda a: torch.zeros(a.shape), steps=3)
    torch.testing.assert_close(adapter.x, before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_rank_one_gradients_are_followed(start, scale):
    # Seed 2: no momentum of its 50 steps has a singular value under 4.7e-3 of the largest, so none crosses the cut-off.
    adapter = Adapter(30, 20, 4, seed=2)
    adapter.start_at(start * torch.diag(torch.tensor([1.0, 0.8, 0.6, 0.4])))
    assert follow(adapter, lambda a: scale * a.randn(30, 1) @ a.randn(20, 1).mT) < STEP_RTOL


def test_gradients_in_the_span_of_the_point_invent_no_directions():
    # U and V are singular vectors of G: A and B are exactly zero, where `eigh` raised and QR invented columns.
    adapter = Adapter(30, 20, 4)
    point = adapter.record.point()
    g = point.u.double() @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)) @ point.v.double().mT
    assert follow(adapter, lambda a: g) < STEP_RTOL


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True},
        {"tangent_iterations": 3},
        {"momentum_form": "orthogonalized"},
        {"nesterov": True, "momentum_form": "orthogonalized", "tangent_iterations": 2},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_every_option_follows_the_dense_computation(options, start):
    adapter = Adapter(30, 20, 4)
    adapter.start_at(start * torch.diag(torch.tensor([1.2, 1.0, 0.9, 0.8])))
    assert follow(adapter, noisy_quadratic(), **options) < STEP_RTOL


def test_a_near_tie_is_cut_at_the_best_distance():
    adapter = Adapter(300, 200, 16)
    dense = DenseRiemannion(adapter.x, adapter.record.u.data, adapter.record.v_transposed.data.mT, POLAR_RTOL)
    g = adapter.randn(300, 200)
    optimizer = Riemannion(adapter.parameters, lr=1.0)
    adapter.set_gradient(g)
    optimizer.step()
    y = -tangent_projection(polar(tangent_projection(g, dense.u, dense.v), POLAR_RTOL), dense.u, dense.v)
    sigma = torch.linalg.svdvals(y)
    assert sigma[15] / sigma[16] < 1.01  # near enough to a tie that no basis is right to 1e-5
    best = sigma[16:].norm()
    assert (adapter.x - y).norm() < (1 + 1e-6) * best


METHODS = [(Riemannion, {}), (RiemannLoRA, {}), (RiemannLoRA, {"simulate_adam": False})]
every_method = pytest.mark.parametrize(("method", "options"), METHODS, ids=str)


@every_method
def test_two_factorizations_of_one_point_follow_the_same_trajectory(method, options):
    first, second = Adapter(40, 28, 6), Adapter(40, 28, 6)
    s = first.randn(6, 6).float() + 2 * torch.eye(6)
    q, p = (torch.linalg.qr(first.randn(6, 6))[0] for _ in range(2))
    point = first.record.point()
    first.start_at(s)
    second.record.assign(FixedRankPoint(point.u.double() @ q, q.mT @ s.double() @ p, point.v.double() @ p))
    optimizers = [method(a.parameters, lr=0.02, **options) for a in (first, second)]
    target, noise = first.randn(40, 28), torch.Generator().manual_seed(7)
    for _ in range(50):
        e = torch.randn(40, 28, generator=noise, dtype=torch.float64)
        for adapter, optimizer in zip((first, second), optimizers, strict=True):
            adapter.set_gradient(adapter.x - target + e)
            optimizer.step()
    assert relative(first.x, second.x) < 1e-4


def test_a_batch_of_layers_steps_as_each_layer_alone():
    shapes = [(30, 20, 4), (20, 30, 4), (30, 20, 4), (16, 16, 4)]
    alone, together = ([Adapter(*shape, seed=i) for i, shape in enumerate(shapes)] for _ in range(2))
    optimizers = [Riemannion(a.parameters, lr=0.02) for a in alone]
    joint = Riemannion([p for a in together for p in a.parameters], lr=0.02)
    for _ in range(5):
        for a, b in zip(alone, together, strict=True):
            g = a.randn(*a.shape)
            a.set_gradient(g)
            b.set_gradient(g)
        for optimizer in optimizers:
            optimizer.step()
        joint.step()
    for a, b in zip(alone, together, strict=True):
        assert relative(b.x, a.x) < STEP_RTOL


@every_method
@pytest.mark.parametrize("cause", [None, float("nan"), float("inf")])
def test_a_layer_that_cannot_move_keeps_every_number_and_a_nonfinite_gradient_is_counted(cause, method, options):
    moving, resting = Adapter(30, 20, 4, seed=1), Adapter(30, 20, 4, seed=2)
    optimizer = method([*moving.parameters, *resting.parameters], lr=0.02, **options)
    for adapter in (moving, resting):
        adapter.set_gradient(adapter.randn(30, 20))
    optimizer.step()

    def numbers() -> list[Tensor]:
        tensors = [t for p in resting.parameters for t in (p.data, *optimizer.state[p].values())]
        return [t.clone() for t in (*tensors, resting.record.s)]

    before, moving_before = numbers(), moving.x
    if cause is None:
        resting.record.u.grad = None
    else:
        resting.record.u.grad[3, 1] = cause
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(), strict=True))
    assert optimizer.skipped_updates == (cause is not None)
    assert moving.x.isfinite().all()
    assert relative(moving.x, moving_before) > 1e-3


def test_a_reduced_matmul_precision_chosen_by_the_user_is_put_back():
    # In a process of its own: torch refuses to go back from the new setting to the legacy one.
    script = """
import torch
from qriemann.optim import Riemannion
from tests.optim.test_riemannion_step import Adapter
backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
product, during = torch.Tensor.__matmul__, []
torch.Tensor.__matmul__ = lambda a, b: (during.append({backend.fp32_precision for backend in backends}), product(a, b))[1]
for legacy in (True, False):
    if legacy:
        torch.set_float32_matmul_precision("medium")
    else:
        torch.backends.fp32_precision = "tf32"
    chosen = [backend.fp32_precision for backend in backends]
    adapter = Adapter(30, 20, 4)
    adapter.set_gradient(adapter.randn(30, 20))
    optimizer = Riemannion(adapter.parameters, lr=0.01)
    during.clear()
    optimizer.step()
    assert during and all(seen <= {"ieee", "none"} for seen in during), during
    assert [backend.fp32_precision for backend in backends] == chosen
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
