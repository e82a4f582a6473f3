"""What the optimizer holds, saves and restores, and how it treats groups, schedules and parameters without a point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from qriemann import InputError, Riemannion, RiemannLoRA, attach
from qriemann.geometry import FixedRankParameter
from qriemann.optim import ScaledAdamW
from tests.models import next_token_loss, relative, same_bits, take_steps, tiny_llama, token_batch, variants, with_lora


def backward(model: nn.Module, seed: int = 0) -> None:
    model.zero_grad()
    next_token_loss(model, token_batch(seed)).backward()


def points_of(model: nn.Module) -> list[FixedRankParameter]:
    return [point for _, point in variants(model).values()]


def all_numbers(model: nn.Module, optimizer: Riemannion) -> list[Tensor]:
    """Everything that moves: every point, every other trainable parameter, and the state of both."""
    numbers = [part.clone() for point in points_of(model) for part in point.point()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            numbers.append(parameter.detach().clone())
            numbers += [value.clone() for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return numbers


# State.


def saved_and_loaded(state: dict, folder: Path) -> dict:
    torch.save(state, folder / "optimizer.pt")
    return torch.load(folder / "optimizer.pt", weights_only=True)


@pytest.mark.parametrize("start", ["zero", "offset"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 7}}], ids=str)
@pytest.mark.parametrize("method", [Riemannion, RiemannLoRA])
def test_a_state_saved_and_loaded_goes_on_bit_for_bit(start, options, method, tmp_path):
    model = with_lora(tiny_llama(), **options)
    optimizer = method(model, lr=0.05, weight_decay=0.1, start=start, seed=0)
    take_steps(model, optimizer, range(3))
    loaded = saved_and_loaded(optimizer.state_dict(), tmp_path)
    # A fresh model with other bases; what is not the optimizer's is taken from the model's own state.
    resumed = with_lora(tiny_llama(), seed=8, **options)
    again = method(resumed, lr=0.3, start=start, seed=1)
    for name, parameter in resumed.named_parameters():
        if parameter.requires_grad and not hasattr(parameter, "fixed_rank"):
            parameter.data.copy_(model.get_parameter(name).data)
    again.load_state_dict(loaded)
    assert same_bits(all_numbers(model, optimizer), all_numbers(resumed, again))
    take_steps(model, optimizer, range(3, 6))
    take_steps(resumed, again, range(3, 6))
    assert same_bits(all_numbers(model, optimizer), all_numbers(resumed, again))


def test_loading_goes_back_in_the_same_optimizer():
    model = with_lora(tiny_llama())
    optimizer = Riemannion(model, lr=0.05)
    take_steps(model, optimizer, range(2))
    state, numbers = optimizer.state_dict(), all_numbers(model, optimizer)
    take_steps(model, optimizer, range(2, 4))
    after = all_numbers(model, optimizer)
    optimizer.load_state_dict(state)
    assert same_bits(all_numbers(model, optimizer), numbers)
    take_steps(model, optimizer, range(2, 4))
    assert same_bits(all_numbers(model, optimizer), after)


def test_a_state_without_factors_is_refused():
    model = with_lora(tiny_llama())
    optimizer = Riemannion(model)
    take_steps(model, optimizer, range(1))
    foreign = torch.optim.Optimizer.state_dict(optimizer)
    with pytest.raises(InputError, match=r"factors of base_model\.model\.model\.layers\.0"):
        optimizer.load_state_dict(foreign)


# Groups and schedules.


def grouped(rates: list[float], **attach_options) -> tuple[PeftModel, list[dict]]:
    """A model and one param group for each layer of it, with the given learning rates."""
    model = with_lora(tiny_llama())
    attach(model, seed=0, **attach_options)
    groups = [
        {"params": [p for n, p in model.named_parameters() if f"layers.{index}." in n and p.requires_grad], "lr": rate}
        for index, rate in enumerate(rates)
    ]
    return model, groups


def test_groups_step_as_separate_optimizers_do():
    model, groups = grouped([0.1, 0.01])
    twin, twin_groups = grouped([0.1, 0.01])
    groups[1] |= {"momentum": 0.5, "weight_decay": 0.2, "nesterov": True}
    optimizer = Riemannion(groups)
    separate = [
        Riemannion(twin_groups[0]["params"], lr=0.1),
        Riemannion(twin_groups[1]["params"], lr=0.01, momentum=0.5, weight_decay=0.2, nesterov=True),
    ]
    for seed in range(3):
        for m in (model, twin):
            backward(m, seed)
        optimizer.step()
        for each in separate:
            each.step()
    for (name, (_, point)), (_, (_, other)) in zip(variants(model).items(), variants(twin).items(), strict=True):
        # Batched matrix products of another batch size may round differently.
        assert relative(point.point().dense(), other.point().dense()) < 1e-5, name


@pytest.mark.parametrize("momentum_form", ["raw", "orthogonalized"])
def test_a_schedule_scales_the_step(momentum_form):
    model = with_lora(tiny_llama())
    optimizer = Riemannion(model, lr=0.1, momentum=0.0, momentum_form=momentum_form, start="offset")
    factors = [1.0, 0.5, 0.0, 0.25]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, 3)])
    for factor in factors:
        before = [point.point().dense() for point in points_of(model)]
        backward(model)
        optimizer.step()
        schedule.step()
        for point, dense in zip(points_of(model), before, strict=True):
            # At S = I the truncation takes little away: the step has spectral norm near lr. At lr 0 only rounding is left.
            sigma = torch.linalg.matrix_norm(point.point().dense() - dense, 2).item()
            assert sigma == pytest.approx(0.1 * factor, rel=0.25, abs=1e-6)


def test_the_learning_rate_can_be_a_tensor():
    models = [with_lora(tiny_llama()) for _ in range(2)]
    rates = [0.05, torch.tensor(0.05)]
    optimizers = [Riemannion(m, lr=rate, seed=0) for m, rate in zip(models, rates, strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer, range(3))
    assert same_bits(*(all_numbers(m, o) for m, o in zip(models, optimizers, strict=True)))


# Parameters without a point.


def reference_adamw(parameters: list[nn.Parameter], **options) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    return copies, torch.optim.AdamW(copies, fused=True, **options)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head", "norm"]}, {"bias": "all"}], ids=str)
def test_parameters_without_a_point_are_trained_as_adamw_trains_them(options):
    model = with_lora(tiny_llama(bias=True), **options)
    optimizer = Riemannion(
        model, lr=0.05, adamw_lr=3e-3, adamw_betas=(0.8, 0.95), adamw_eps=1e-7, adamw_weight_decay=0.1
    )
    others = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "fixed_rank")]
    assert others
    before = [parameter.detach().clone() for parameter in others]
    copies, adamw = reference_adamw(others, lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)
    for seed in range(4):
        backward(model, seed)
        for parameter, twin in zip(others, copies, strict=True):
            twin.grad = None if parameter.grad is None else parameter.grad.clone()
        optimizer.step()
        adamw.step()
    for parameter, twin in zip(others, copies, strict=True):
        assert torch.equal(parameter, twin)
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(others, before, strict=True))


def test_a_schedule_scales_both_rates():
    model = with_lora(tiny_llama(), modules_to_save=["lm_head"])
    optimizer = Riemannion(model, lr=0.1, adamw_lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert sorted(schedule.get_last_lr()) == [5e-4, 0.05]


@pytest.mark.parametrize("prefix", ["", "adamw_"])
def test_a_group_of_plain_parameters_sets_its_own_adamw(prefix):
    model = with_lora(tiny_llama(), modules_to_save=["lm_head"])
    attach(model)
    factors = [p for p in model.parameters() if hasattr(p, "fixed_rank")]
    others = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "fixed_rank")]
    options = {"lr": 0.02, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.3}
    group = {"params": others} | {f"{prefix}{key}": value for key, value in options.items()}
    optimizer = Riemannion([{"params": factors}, group], lr=0.1)
    copies, adamw = reference_adamw(others, **options)
    for seed in range(2):
        backward(model, seed)
        for parameter, twin in zip(others, copies, strict=True):
            twin.grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(others, copies, strict=True))


@pytest.mark.parametrize(("saved", "other"), [("zero", "offset"), ("offset", "zero")])
def test_a_state_of_the_other_start_is_saved_so_that_plain_peft_loads_it(saved, other, tmp_path):
    first, second = with_lora(tiny_llama()), with_lora(tiny_llama())
    optimizer = Riemannion(first, lr=0.1, start=saved, seed=0)
    take_steps(first, optimizer, range(2))
    Riemannion(second, lr=0.1, start=other, seed=1).load_state_dict(optimizer.state_dict())
    second.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    ids = token_batch()
    assert relative(reloaded(ids).logits, first(ids).logits) < 1e-5


# What it says about itself, and what it refuses.


@pytest.mark.parametrize("start", ["zero", "offset"])
def test_the_drift_is_the_worst_entry_and_stays_small(start):
    model = with_lora(tiny_llama())
    optimizer = Riemannion(model, lr=0.1, start=start)
    take_steps(model, optimizer, range(20))
    worst = max(
        (q.double().mT @ q.double() - torch.eye(q.shape[1], dtype=torch.float64)).abs().max().item()
        for point in points_of(model)
        for q in (point.point().u, point.point().v)
    )
    assert optimizer.orthonormality_drift() == pytest.approx(worst, rel=1e-6)
    assert worst < 1e-5


OUT_OF_RANGE = {
    "lr": [-1e-3, float("nan"), float("inf")],
    "momentum": [-0.1, 1.0, float("nan")],
    "weight_decay": [-1.0, float("nan")],
    "tangent_iterations": [0],
    "momentum_form": ["cooked"],
    "beta2": [1.0],
    "norm_eps": [-1e-8],
    "damping": [-1e-6, float("nan")],
    "damping_form": ["relativ"],
    "adamw_lr": [-1.0],
    "adamw_betas": [(0.9, 1.0), (-0.1, 0.9)],
    "adamw_eps": [-1e-8],
    "adamw_weight_decay": [float("inf")],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in OUT_OF_RANGE.items() for v in values])
def test_values_out_of_range_are_refused_by_name_before_anything_is_attached(key, value):
    model = with_lora(tiny_llama(layers=1))
    others = {"beta2": RiemannLoRA, "norm_eps": RiemannLoRA, "damping": ScaledAdamW, "damping_form": ScaledAdamW}
    with pytest.raises(InputError, match=f"{key} must be"):
        others.get(key, Riemannion)(model, **{key: value})
    assert not variants(model)


def test_a_value_out_of_range_in_a_group_is_refused():
    _, groups = grouped([0.1, -0.1])
    with pytest.raises(InputError, match=r"lr must be a finite number >= 0, got -0\.1"):
        Riemannion(groups)


def test_a_closure_is_refused_and_nothing_moves():
    model = with_lora(tiny_llama(layers=1))
    optimizer = Riemannion(model)
    backward(model)
    before = all_numbers(model, optimizer)
    with pytest.raises(InputError, match="closure must be None"):
        optimizer.step(lambda: 0.0)
    assert same_bits(all_numbers(model, optimizer), before)


def test_factors_of_one_adapter_in_two_groups_or_one_alone_are_refused_by_name():
    model = with_lora(tiny_llama(layers=1))
    attach(model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if "lora_A" in n]},
        {"params": [p for n, p in named.items() if "lora_B" in n]},
    ]
    for given in (groups, groups[0]["params"]):
        with pytest.raises(InputError, match=r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj split"):
            Riemannion(given)


def test_a_group_that_comes_later_is_refused():
    model = with_lora(tiny_llama())
    optimizer = Riemannion(model, lr=0.1)
    with pytest.raises(InputError, match="param groups must be given when Riemannion is made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    take_steps(model, optimizer, range(1))


def test_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="at least one trainable parameter"):
        Riemannion([])
    with pytest.raises(InputError, match="LoRA adapter"):
        Riemannion(tiny_llama(layers=1))


@pytest.mark.parametrize("method", [Riemannion, RiemannLoRA])
def test_factors_that_are_not_on_the_manifold_are_refused(method):
    # AdamW at adamw_lr would train them, and nothing would say so.
    model = with_lora(tiny_llama())
    with pytest.raises(
        InputError, match=r"factors of an adapter on the fixed-rank manifold, got none.*attach\(model\)"
    ):
        method([p for p in model.parameters() if p.requires_grad])


def test_attach_options_need_the_model():
    model = with_lora(tiny_llama(layers=1))
    attach(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(InputError, match="start must come with the model"):
        Riemannion(parameters, start="zero")


def test_capturable_is_refused_where_a_step_would_wait_for_the_device():
    model = with_lora(tiny_llama())
    with pytest.raises(InputError, match="capturable"):
        Riemannion(model, capturable=True)
