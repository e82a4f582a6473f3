"""RiemannLoRA against a dense float64 computation of its own update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qriemann.errors import InputError
from qriemann.geometry import FixedRankPoint
from qriemann.ops import POLAR_RTOL
from qriemann.optim import RiemannLoRA
from tests.dense import DenseRiemannLoRA, best_approximation, low_rank_factors, tangent_projection
from tests.optim.test_riemannion_state import saved_and_loaded
from tests.optim.test_riemannion_step import STEP_RTOL, Adapter, noisy_quadratic, relative


def follow(
    adapter: Adapter,
    gradients,
    steps: int = 50,
    lr: float = 0.01,
    momentum: float = 0.9,
    rtol: float = POLAR_RTOL,
    **options,
) -> float:
    """The worst relative distance to the dense trajectory over the steps."""
    dense = DenseRiemannLoRA(adapter.x, adapter.record.u.data, adapter.record.v_transposed.data.mT, rtol)
    optimizer = RiemannLoRA(adapter.parameters, lr=lr, momentum=momentum, **options)
    worst = 0.0
    for _ in range(steps):
        g = gradients(adapter)
        adapter.set_gradient(g)
        optimizer.step()
        dense.step(g, lr, momentum, **options)
        worst = max(worst, relative(adapter.x, dense.x))
    assert optimizer.orthonormality_drift() < 1e-5
    return worst


@pytest.mark.parametrize("simulate_adam", [False, True])
@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize(("m", "n", "rank"), [(30, 20, 4), (97, 65, 16), (33, 17, 1), (12, 12, 12)])
def test_fifty_steps_follow_the_dense_computation(m, n, rank, start, simulate_adam):
    adapter = Adapter(m, n, rank)
    adapter.start_at(start * torch.diag(torch.linspace(1.2, 0.8, rank)))
    assert follow(adapter, noisy_quadratic(), simulate_adam=simulate_adam) < STEP_RTOL


@pytest.mark.parametrize(
    "options",
    [
        {"simulate_adam": False, "momentum": 0.0},
        {"simulate_adam": True, "momentum": 0.0, "beta2": 0.9},
        # Of the order of the blocks' own norms, and of no weight.
        {"simulate_adam": True, "norm_eps": 20.0},
        {"simulate_adam": True, "norm_eps": 0.0},
        {"simulate_adam": True, "weight_decay": 0.1},
        {"simulate_adam": False, "momentum": 0.5, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_every_option_follows_the_dense_computation(options):
    adapter = Adapter(30, 20, 4)
    adapter.start_at(torch.diag(torch.tensor([1.2, 1.0, 0.9, 0.8])))
    assert follow(adapter, noisy_quadratic(), **options) < STEP_RTOL


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize(("m", "n", "rank"), [(30, 20, 4), (97, 65, 16), (33, 17, 1)])
def test_fifty_steps_with_simulated_adam_follow_a_computation_without_any_cut_off(m, n, rank, start):
    # Gradients of full rank: only where U spans all rows is A nothing but rounding, which the package counts as zero.
    adapter = Adapter(m, n, rank)
    adapter.start_at(start * torch.diag(torch.linspace(1.2, 0.8, rank)))
    assert follow(adapter, noisy_quadratic(), rtol=0.0, simulate_adam=True) < STEP_RTOL


def test_without_momentum_it_is_riemannian_gradient_descent():
    adapter = Adapter(30, 20, 4)
    adapter.start_at(torch.eye(4))
    optimizer = RiemannLoRA(adapter.parameters, lr=0.1, momentum=0.0, simulate_adam=False)
    for _ in range(5):
        g, before = adapter.randn(30, 20), adapter.x
        u, v = low_rank_factors(before, 4)
        adapter.set_gradient(g)
        optimizer.step()
        assert relative(adapter.x, best_approximation(before - 0.1 * tangent_projection(g, u, v), 4)) < STEP_RTOL


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_with_simulated_adam_the_step_does_not_depend_on_the_gradients_scale(scale):
    adapter = Adapter(30, 20, 4)
    assert follow(adapter, noisy_quadratic(scale), simulate_adam=True) < STEP_RTOL


@pytest.mark.parametrize("simulate_adam", [False, True])
def test_two_factorizations_of_one_point_follow_the_same_trajectory(simulate_adam):
    first, second = Adapter(40, 28, 6), Adapter(40, 28, 6)
    s = first.randn(6, 6).float() + 2 * torch.eye(6)
    q, p = (torch.linalg.qr(first.randn(6, 6))[0] for _ in range(2))
    point = first.record.point()
    first.start_at(s)
    second.record.assign(FixedRankPoint(point.u.double() @ q, q.mT @ s.double() @ p, point.v.double() @ p))
    optimizers = [RiemannLoRA(a.parameters, lr=0.02, simulate_adam=simulate_adam) for a in (first, second)]
    for _ in range(30):
        g = first.randn(40, 28)
        for adapter, optimizer in zip((first, second), optimizers, strict=True):
            adapter.set_gradient(adapter.x + g)
            optimizer.step()
    assert relative(first.x, second.x) < 1e-4


def test_a_nonfinite_gradient_leaves_point_momentum_and_norms_alone():
    good, bad = Adapter(30, 20, 4, seed=1), Adapter(30, 20, 4, seed=2)
    optimizer = RiemannLoRA([*good.parameters, *bad.parameters], lr=0.02)
    for adapter in (good, bad):
        adapter.set_gradient(adapter.randn(30, 20))
    optimizer.step()

    def numbers() -> list[Tensor]:
        return [t.clone() for p in bad.parameters for t in (p.data, *optimizer.state[p].values())]

    before, good_before = numbers(), good.x
    bad.record.u.grad[3, 1] = float("nan")
    optimizer.step()
    assert len(before) == 5
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(), strict=True))
    assert optimizer.skipped_updates == 1
    assert good.x.isfinite().all()
    assert relative(good.x, good_before) > 1e-3


@pytest.mark.parametrize("simulate_adam", [False, True])
def test_a_state_saved_and_loaded_goes_on_bit_for_bit(simulate_adam, tmp_path):
    def fresh() -> tuple[Adapter, RiemannLoRA]:
        adapter = Adapter(30, 20, 4)
        return adapter, RiemannLoRA(adapter.parameters, lr=0.02, simulate_adam=simulate_adam)

    def go_on(adapter: Adapter, optimizer: RiemannLoRA, seeds: range) -> None:
        for seed in seeds:
            adapter.generator.manual_seed(seed)
            adapter.set_gradient(adapter.randn(30, 20))
            optimizer.step()

    adapter, optimizer = fresh()
    go_on(adapter, optimizer, range(4))
    state = saved_and_loaded(optimizer.state_dict(), tmp_path)
    go_on(adapter, optimizer, range(4, 8))
    other, resumed = fresh()
    resumed.load_state_dict(state)
    go_on(other, resumed, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters, other.parameters, strict=True))
    assert torch.equal(adapter.record.s, other.record.s)


def test_training_a_model_with_it_lowers_the_loss():
    from tests.models import next_token_loss, tiny_llama, token_batch, with_lora

    model = with_lora(tiny_llama())
    optimizer = RiemannLoRA(model, lr=0.1)
    ids = token_batch()
    before = next_token_loss(model, ids).item()
    for _ in range(30):
        optimizer.zero_grad()
        next_token_loss(model, ids).backward()
        optimizer.step()
    assert next_token_loss(model, ids).item() < 0.8 * before


@pytest.mark.parametrize(("key", "value"), [("lr", -1.0), ("momentum", 1.0), ("beta2", 1.0), ("norm_eps", -1e-8)])
def test_values_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(InputError, match=key):
        RiemannLoRA(Adapter(30, 20, 4).parameters, **{key: value})
