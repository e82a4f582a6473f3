"""A base whose weights are also held dequantized computes, trains, merges and saves what it does without, bit for bit."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from qriemann.base import dense_weights
from qriemann.base.dense_weights import DenseLinear4bit, hold_dense
from qriemann.optim.methods import METHODS
from qriemann.training.seam import for_trainer
from qriemann.upstream import protect_quantized_weights
from tests.models import fill_lora, load_nf4, next_token_loss, save_tiny_base, token_batch, with_lora


@pytest.fixture
def stock(tmp_path) -> nn.Module:
    model = load_nf4(save_tiny_base(tmp_path))
    protect_quantized_weights(model)
    return model


@pytest.fixture
def held(stock: nn.Module) -> nn.Module:
    model = copy.deepcopy(stock)
    assert hold_dense(model).held
    return model


def quantized_layers(model: nn.Module) -> list[bnb.nn.Linear4bit]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def copied(model: nn.Module) -> int:
    """How many layers compute with a copy."""
    return sum(isinstance(m, DenseLinear4bit) and m.dense_weight() is not None for m in model.modules())


def trained_through(base: nn.Module, *, checkpointing: bool, autocast: bool) -> list[torch.Tensor]:
    """Logits in eval mode, then the gradients of a step, the embeddings' among them."""
    model = with_lora(base)
    fill_lora(model)
    if checkpointing:
        base.activation_checkpointing_enable()
    model.get_input_embeddings().weight.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        with torch.no_grad():
            logits = model.eval()(token_batch()).logits
        next_token_loss(model.train(), token_batch()).backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_dequantizing_at_each_use(checkpointing, autocast, stock, held):
    options = {"checkpointing": checkpointing, "autocast": autocast}
    expected, found = trained_through(stock, **options), trained_through(held, **options)
    assert copied(held) == 14
    assert len(expected) == 2 + 2 * 14
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_with_a_bias_gives_the_same_for_any_input_dtype(seen, compute):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(96, 64, compute_dtype=compute, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 96, dtype=compute), requires_grad=False, quant_type="nf4")
    layer.requires_grad_(False).to("cpu").support_avx512bf16_for_cpu = False
    results = []
    for _ in range(2):
        x = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(1)).to(seen).requires_grad_()
        y = layer(x)
        y.sum().backward()
        results.append((y.detach(), x.grad))
        assert hold_dense(layer).bytes == 64 * 96 * compute.itemsize
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_the_copy_is_what_the_bytes_stand_for_and_neither_is_saved_differently(stock, held):
    before, after = stock.state_dict(), held.state_dict()
    assert before.keys() == after.keys()
    torch.testing.assert_close(dict(after), dict(before), rtol=0, atol=0)
    for layer in quantized_layers(held):
        expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(layer.dense_weight(), expected, rtol=0, atol=0)
    # The trainer's .to(device) changes nothing, and a second call makes nothing again.
    held.to("cpu")
    kept = [layer.dense_weight() for layer in quantized_layers(held)]
    hold_dense(held)
    assert all(layer.dense_weight() is one for layer, one in zip(quantized_layers(held), kept, strict=True))


def test_nothing_is_made_where_memory_is_short(stock, monkeypatch):
    needed = sum(4 * layer.in_features * layer.out_features for layer in quantized_layers(stock))
    monkeypatch.setattr(dense_weights, "free_bytes", lambda device: 2 * needed - 1)
    described = hold_dense(stock)
    assert (described.held, described.layers, described.bytes) == (False, 14, needed)
    assert copied(stock) == 0
    monkeypatch.setattr(dense_weights, "free_bytes", lambda device: 2 * needed)
    assert hold_dense(stock).held
    # Processes that load beside each other share what is free.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not dense_weights.fits(needed)


@pytest.mark.filterwarnings("ignore:(M|Unm)erge lora module to 4-bit linear may get different generations:UserWarning")
def test_a_merge_and_what_follows_it_use_the_new_bytes(stock, held):
    models = [with_lora(stock), with_lora(held)]
    logits = []
    for model in models:
        fill_lora(model)
        model.eval()
        seen = []
        for change in (lambda model: None, lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()):
            change(model)
            with torch.no_grad():
                seen.append(model(token_batch()).logits)
        logits.append(seen)
    assert copied(held) == 0
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)
    assert not torch.equal(logits[0][0], logits[0][1])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_or_pickle_is_a_stock_model_that_computes_the_same(again, held):
    other = again(held)
    assert {type(layer) for layer in quantized_layers(other)} == {bnb.nn.Linear4bit}
    with torch.no_grad():
        torch.testing.assert_close(other(token_batch()).logits, held(token_batch()).logits, rtol=0, atol=0)
    assert hold_dense(other).held


def test_a_weight_that_was_quantized_from_another_dtype_gets_no_copy(stock):
    # bitsandbytes rounds it to that dtype for the gradient and not for the product.
    for layer in quantized_layers(stock):
        layer.compute_dtype = torch.bfloat16
    assert hold_dense(stock) is None


@pytest.mark.parametrize("method", ["riemannion", "adamw"])
def test_checkpointing_on_a_cpu_is_warned_of_when_the_trainer_makes_its_optimizer(method, stock, caplog):
    model = with_lora(stock)
    factory, options = for_trainer(method, lr=1e-3)
    assert method in METHODS
    factory()(model, **options)
    assert "checkpointing" not in caplog.text
    stock.activation_checkpointing_enable()
    factory()(model, **options)
    assert "gradient_checkpointing=False" in caplog.text
