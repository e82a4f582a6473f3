"""The start that is made from the gradient holds what it promises of the dense one, and changes nothing else."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from qriemann import InputError, Riemannion, attach, locally_optimal_
from qriemann.geometry.parameter import orthonormality_drift
from qriemann.upstream import protect_quantized_weights
from tests.dense import shares_kept
from tests.models import (
    assert_unchanged,
    dense_gradients,
    dequantized,
    fill_lora,
    load_nf4,
    logits,
    logits_under_plain_peft,
    next_token_loss,
    relative,
    save_tiny_base,
    snapshot,
    tiny_llama,
    token_batch,
    variants,
    with_lora,
)

RANK = 4
# What the issue asks of the projected gradient, for one power iteration.
KEPT = 0.99
# s X x and s X_0 x cancel, each with a float32 error of some 1e-7 of |X x|.
OFFSET_START_RTOL = 1e-5
# The same sums in another order, of factors rounded to float32.
SAVED_RTOL = 1e-5

starts = pytest.mark.parametrize("start", ["offset", "zero"])
BATCHES = [token_batch(seed, rows=4, length=20) for seed in (10, 11, 12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(folder) -> PeftModel:
    return with_lora(load_nf4(folder), r=RANK)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return next_token_loss(model, ids)


def kept_shares(model: nn.Module, base: nn.Module, batches: list[Tensor], rank: int) -> dict[str, float]:
    """How much of the best approximation of each layer's dense gradient, of this rank, its tangent space holds."""
    points = {name: point.point() for name, (_, point) in variants(model).items()}
    return shares_kept({name: (p.u, p.v) for name, p in points.items()}, dense_gradients(base, model, batches), rank)


# What the start holds of the gradient.


@starts
@pytest.mark.parametrize("attached_at", [None, "offset", "zero"])
def test_the_tangent_space_holds_the_best_approximation_of_the_dense_gradient(start, attached_at, model):
    if attached_at is not None:
        attach(model, start=attached_at, seed=5)
    locally_optimal_(model, BATCHES, loss, start=start)
    shares = kept_shares(model, dequantized(model), BATCHES, 2 * RANK if start == "offset" else RANK)
    assert len(shares) == 14
    assert min(shares.values()) >= KEPT


def test_a_zero_start_moves_along_the_best_approximation_in_its_first_step(model):
    locally_optimal_(model, BATCHES, loss, start="zero")
    gradients = dense_gradients(dequantized(model), model, BATCHES)
    for ids in BATCHES:
        loss(model, ids).backward()
    Riemannion(model, lr=1e-2).step()
    for name, (_, point) in variants(model).items():
        # polar of the best approximation of rank r, which is all that the tangent space holds.
        left, _, right = torch.linalg.svd(gradients[name], full_matrices=False)
        step = -1e-2 * left[:, :RANK] @ right[:RANK]
        assert relative(point.point().dense(), step) < 0.02, name


# What it leaves as it was.


@starts
@pytest.mark.parametrize("attached_at", [None, "offset", "zero"])
def test_the_function_and_every_frozen_byte_stay_as_they_were(start, attached_at, model):
    # On a CPU with AVX512-BF16 the base would be repacked by this first forward.
    protect_quantized_weights(model)
    expected, before = logits(model.eval()), snapshot(model)
    if attached_at is not None:
        attach(model, start=attached_at, seed=5)
    points = locally_optimal_(model, BATCHES, loss, start=start)
    if start == "zero":
        assert torch.equal(logits(model), expected)
    else:
        assert relative(logits(model), expected) < OFFSET_START_RTOL
    assert orthonormality_drift(points) < 1e-6
    assert_unchanged(model, before, frozen=True)


def test_modes_gradients_and_random_numbers_stay_as_they_were():
    model = with_lora(tiny_llama(), r=RANK, lora_dropout=0.5, modules_to_save=["lm_head"])
    attach(model, seed=5)
    model.train()
    model.base_model.model.model.layers[1].eval()
    loss(model, BATCHES[0]).backward()
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head" in name for name in gradients)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def noisy(model: nn.Module, ids: Tensor) -> Tensor:
        return loss(model, ids) * (1 + 0 * (torch.rand(()) + np.random.rand() + random.random()))

    locally_optimal_(model, BATCHES, noisy)
    assert {name: module.training for name, module in model.named_modules()} == modes
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert after.keys() == gradients.keys()
    assert all(torch.equal(after[name], gradients[name]) for name in gradients)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_one_seed_gives_one_start_whatever_was_drawn_before():
    starts = []
    for seed in (0, 0, 1):
        model = with_lora(tiny_llama(layers=1), r=RANK)
        torch.rand(3)
        locally_optimal_(model, BATCHES, loss, seed=seed)
        starts.append(next(iter(variants(model).values()))[1].point().dense())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_progress_is_told_after_each_batch_of_each_pass():
    told = []
    model = with_lora(tiny_llama(layers=1), r=RANK)
    locally_optimal_(model, BATCHES[:2], loss, power_iterations=2, progress=lambda *counts: told.append(counts))
    assert told == [(done, 12) for done in range(1, 13)]


# What is saved.


def test_a_start_that_was_changed_is_saved_as_what_it_is(folder, tmp_path):
    options = {"r": RANK, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 3}}
    expected, saved = [], []
    for attached_at, start, rank in (
        ("zero", "offset", 2 * RANK),
        ("offset", "zero", RANK),
    ):
        for rslora in (False, True):
            model = with_lora(load_nf4(folder), use_rslora=rslora, **options)
            attach(model, start=attached_at, seed=5)
            locally_optimal_(model, BATCHES, loss, start=start)
            loss(model, BATCHES[0]).backward()
            Riemannion(model, lr=0.1).step()
            assert model.peft_config["default"].r == rank
            expected.append(logits(model.eval()))
            saved.append((folder, True, tmp_path / str(len(saved))))
            model.save_pretrained(saved[-1][-1])
    # What PEFT makes of the files where qriemann is not installed.
    for got, wanted in zip(logits_under_plain_peft(saved, token_batch()), expected, strict=True):
        assert relative(got, wanted) < SAVED_RTOL


def last_layer_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """A loss whose gradient reaches nothing but the second decoder layer."""
    hidden = model.get_submodule("base_model.model.model.embed_tokens")(ids).detach()
    inner = model.get_submodule("base_model.model.model")
    positions = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(hidden, position_ids=positions)
    return inner.layers[1](hidden, position_embeddings=rotary).square().mean()


def test_a_layer_that_the_loss_does_not_reach_keeps_random_bases_and_is_named(caplog):
    model = with_lora(tiny_llama(), r=RANK)
    before = {point.name: point.point().dense() for point in attach(model, seed=5, start="offset")}
    expected = logits(model)
    points = locally_optimal_(model, BATCHES, last_layer_loss, alpha=1.0)
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("gradient")]
    assert line.startswith("7 layers have no gradient")
    assert "layers.0.self_attn.q_proj" in line
    kept = {point.name for point in points if torch.equal(point.point().dense(), before[point.name])}
    assert kept == {name for name in before if "layers.0" in name}
    assert relative(logits(model), expected) < OFFSET_START_RTOL


# What is refused, with the model as it was.


def not_a_number(model: nn.Module, ids: Tensor) -> Tensor:
    return loss(model, ids) * (float("nan") if torch.equal(ids, BATCHES[1]) else 1.0)


def overflowing(model: nn.Module, ids: Tensor) -> Tensor:
    value = loss(model, ids)
    return value + (value - value.detach()).sqrt()  # zero, with an infinite slope


def unreached(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.ones((), requires_grad=True) * 2


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"batches": []}, "batches must hold at least one batch, got none"),
    "a NaN loss": ({"loss_fn": not_a_number}, "the loss must be finite at the start, got nan in batch 2 of 3"),
    "a gradient that overflows": ({"loss_fn": overflowing}, "the gradient is not finite .* in base_model"),
    "no gradient": ({"loss_fn": unreached}, "no gradient in any of 14 adapted layers"),
    "no labels": (
        {"batches": [{"input_ids": BATCHES[0]}], "loss_fn": None},
        r"batches must hold labels.* got \['input_ids'\]",
    ),
    "not a mapping": ({"loss_fn": None}, "batches must hold labels.* got Tensor"),
    "a misspelt start": ({"start": "ofset"}, "start must be one of 'zero', 'offset', got 'ofset'"),
    "alpha 0": ({"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
    "batches None": ({"batches": None}, "batches must be an iterable of training batches, got None"),
    "a loss that is no tensor": ({"loss_fn": lambda *_: 1.0}, "the loss must be one number with a gradient, got 1.0"),
    "a loss of each row": (
        {"loss_fn": lambda model, ids: model(ids).logits.sum((1, 2))},
        r"the loss must be one number with a gradient, got \[4\]",
    ),
    "a loss without a gradient": (
        {"loss_fn": lambda model, ids: loss(model, ids).detach()},
        "the loss must be one number with a gradient, got .*requires_grad False",
    ),
    "oversampling negative": ({"oversampling": -1}, "oversampling must be an integer >= 0, got -1"),
    "power_iterations 0.5": ({"power_iterations": 0.5}, "power_iterations must be an integer >= 0, got 0.5"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("attached", [True, False], ids=["attached", "plain"])
def test_what_cannot_be_used_is_refused_and_the_model_stays_as_it_was(attached, options, message, model):
    if attached:
        attach(model, start="zero", seed=5)
    before, config = snapshot(model), model.peft_config["default"].to_dict()
    state, training = torch.get_rng_state(), model.training
    arguments = {"batches": BATCHES, "loss_fn": loss, **options}
    with pytest.raises(InputError, match=message) as error:
        locally_optimal_(model, arguments.pop("batches"), arguments.pop("loss_fn"), **arguments)
    assert "\n" not in str(error.value)
    assert_unchanged(model, before)
    assert len(variants(model)) == (14 if attached else 0)
    assert model.peft_config["default"].to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())


def stepped(model: nn.Module) -> None:
    attach(model, seed=5)
    loss(model, BATCHES[0]).backward()
    Riemannion(model, lr=0.1).step()


@pytest.mark.parametrize("use", [fill_lora, stepped])
def test_an_adapter_that_holds_something_is_refused(use, model):
    use(model)
    before = snapshot(model)
    with pytest.raises(InputError, match=r"must still be zero to be initialized.*layers.0.self_attn.q_proj"):
        locally_optimal_(model, BATCHES, loss)
    assert_unchanged(model, before)
