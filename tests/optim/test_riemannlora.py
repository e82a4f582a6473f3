"""RiemannLoRA against a dense float64 computation of its own update."""

from __future__ import annotations

import functools

import pytest
import torch

from qriemann.optim import RiemannLoRA
from tests.dense import DenseRiemannLoRA
from tests.optim import test_riemannion_step as riemannion_step
from tests.optim.test_riemannion_step import STEP_RTOL, Adapter, noisy_quadratic

follow = functools.partial(riemannion_step.follow, method=RiemannLoRA, truth=DenseRiemannLoRA)


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
