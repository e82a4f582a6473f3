"""RiemannLoRA against a dense float64 computation of its own update."""

from __future__ import annotations

import pytest
import torch

from qriemann.ops import POLAR_RTOL
from qriemann.optim import RiemannLoRA
from tests.dense import DenseRiemannLoRA
from tests.models import relative
from tests.optim.test_riemannion_step import STEP_RTOL, Adapter, noisy_quadratic


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


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_with_simulated_adam_the_step_does_not_depend_on_the_gradients_scale(scale):
    adapter = Adapter(30, 20, 4)
    assert follow(adapter, noisy_quadratic(scale), simulate_adam=True) < STEP_RTOL
