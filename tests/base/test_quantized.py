"""A 4-bit base is the same before and after anything that is done with it, and gradients through it are right.

On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight in its first forward in eval mode. Every base here is told
that it runs on such a CPU, so that whatever lets the repacking happen fails on any machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn

from qriemann import InputError, Riemannion, attach
from qriemann.geometry import FixedRankParameter
from qriemann.upstream import protect_quantized_weights
from tests.models import (
    assert_blocks_match,
    assert_unchanged,
    dense_gradients,
    dequantized,
    load_nf4,
    move_points,
    next_token_loss,
    relative,
    save_tiny_base,
    snapshot,
    token_batch,
    with_lora,
)

# As for a float base, in test_layer.py: the 4-bit weight is dequantized to float32 and then an ordinary matrix.
FLOAT32_RTOL = 1e-5


@pytest.fixture
def base(tmp_path) -> nn.Module:
    model = load_nf4(save_tiny_base(tmp_path))
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    return model


def evaluate(model: PeftModel) -> None:
    model.eval()
    with torch.no_grad():
        next_token_loss(model, token_batch())


def generate(model: PeftModel) -> None:
    model.eval()
    model.generate(token_batch(), attention_mask=torch.ones(2, 9), max_new_tokens=3, do_sample=False)


USES: dict[str, Callable[[PeftModel], None]] = {"an evaluation": evaluate, "a generation": generate}


def put_on_manifold(base: nn.Module, start: str, **options) -> tuple[PeftModel, list[FixedRankParameter]]:
    model = with_lora(base, **options)
    points = attach(model, start=start, seed=3)
    move_points(points, scale=0.1)
    return model, points


@pytest.mark.parametrize("start", ["zero", "offset"])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_gradients_are_those_of_the_dequantized_model_before_and_after(use, start, base):
    reference = dequantized(base)
    model, _ = put_on_manifold(base, start)
    ids = token_batch(seed=8)
    expected = dense_gradients(reference, model, [ids])
    for _ in range(2):
        model.train()
        model.zero_grad()
        next_token_loss(model, ids).backward()
        assert_blocks_match(model, expected, FLOAT32_RTOL)
        use(model)


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_gradients_reach_the_embeddings_before_and_after(use, base):
    # On an affected CPU the gradient here was 400 times too small after an evaluation.
    reference = dequantized(base)
    model = with_lora(base)
    attach(model)  # at S = 0, where the adapted model is the base model
    ids = token_batch(seed=8)
    next_token_loss(reference, ids).backward()
    expected = reference.get_input_embeddings().weight.grad
    embeddings = model.get_input_embeddings().weight
    for _ in range(2):
        model.train()
        embeddings.requires_grad_(True)
        embeddings.grad = None
        next_token_loss(model, ids).backward()
        assert relative(embeddings.grad, expected) < FLOAT32_RTOL
        embeddings.requires_grad_(False)
        use(model)


@pytest.mark.parametrize("start", ["zero", "offset"])
def test_training_evaluation_and_generation_leave_every_frozen_byte(start, base):
    model = with_lora(base)
    before = snapshot(model)
    optimizer = Riemannion(model, lr=0.05, start=start, seed=0)
    for seed in range(4):
        model.train()
        optimizer.zero_grad()
        next_token_loss(model, token_batch(seed)).backward()
        optimizer.step()
        evaluate(model)
        generate(model)
    assert_unchanged(model, before, frozen=True)
    assert optimizer.orthonormality_drift() < 1e-5


# https://github.com/huggingface/peft: prepare_model_for_kbit_training of 0.21 uses what transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_prepared_by_peft_leaves_the_dense_blocks(base):
    reference = dequantized(base)
    model, _ = put_on_manifold(
        prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False}), "offset"
    )
    model.train()
    ids = token_batch(seed=8)
    next_token_loss(model, ids, use_cache=False).backward()
    assert_blocks_match(model, dense_gradients(reference, model, [ids]), FLOAT32_RTOL)


def test_a_base_that_was_repacked_already_is_refused_by_name_and_left_as_it_was(base):
    model = with_lora(base)
    repacked = "base_model.model.model.layers.1.self_attn.o_proj"
    state = copy.deepcopy(model.get_submodule(repacked).base_layer.weight.quant_state)
    state.packing_format_for_cpu = True
    model.get_submodule(repacked).base_layer.weight.quant_state = state
    factors = {name: p.data.clone() for name, p in model.named_parameters() if "lora_" in name}
    with pytest.raises(InputError, match=rf"{repacked}.*repacked.*load the model again"):
        attach(model)
    assert all(torch.equal(model.get_parameter(name).data, value) for name, value in factors.items())
    assert not any(getattr(module, "lora_variant", {}) for module in model.modules())


def test_an_unprotected_layer_does_reach_the_repacking(base, monkeypatch):
    """Once this fails, bitsandbytes has changed and the protection may have nothing left to protect from."""

    def refuse(*arguments):
        raise RuntimeError("repacked")

    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", refuse)
    base.eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="repacked"):
        base(token_batch())
    assert protect_quantized_weights(base) == 14
    with torch.no_grad():
        base(token_batch())
