"""Embeddings in host memory compute what embeddings on the device do, and stay where they are.

No machine of the tests has a second device that computes; tensors without content stand for it.
"""

import copy

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from qriemann.base.host_embedding import keep_embeddings_on_host
from tests.models import fill_lora, next_token_loss, tiny_llama, token_batch, with_lora


def offloaded(model):
    model = copy.deepcopy(model)
    keep_embeddings_on_host(model, "tiny")
    return model


def gradients(model, ids, *, checkpointing):
    model = with_lora(model)
    fill_lora(model)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable()
        model.get_base_model().enable_input_require_grads()
    next_token_loss(model.train(), ids).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_are_those_of_embeddings_on_the_device(checkpointing):
    model, ids = tiny_llama(), token_batch()
    expected = gradients(copy.deepcopy(model), ids, checkpointing=checkpointing)
    found = gradients(offloaded(model), ids, checkpointing=checkpointing)
    assert any(grad.norm() > 0 for grad in expected.values())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_matrix_stays_when_the_model_moves_and_its_rows_follow_the_model():
    before = tiny_llama().requires_grad_(False)
    model = offloaded(before).to("meta")
    embeddings = model.get_input_embeddings()
    torch.testing.assert_close(embeddings.weight, before.get_input_embeddings().weight, rtol=0, atol=0)
    assert {p.device.type for name, p in model.named_parameters() if "embed_tokens" not in name} == {"meta"}
    assert model.device == torch.device("meta")
    seen = []
    model.enable_input_require_grads()
    embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(input_ids=token_batch()).logits
    assert seen[0].device == logits.device == torch.device("meta")
    # Checkpointed layers pass gradients on only from an input that asks for them, on the device where it is used.
    assert seen[0].requires_grad
    assert seen[0].is_leaf


def test_a_change_of_dtype_reaches_the_matrix():
    model = offloaded(tiny_llama()).to(torch.bfloat16)
    assert model(input_ids=token_batch()).logits.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_an_embedding_that_scales_its_rows_goes_on_scaling_them():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
    )
    model = Gemma3ForCausalLM(config).eval()
    ids = token_batch()
    with torch.no_grad():
        torch.testing.assert_close(offloaded(model)(ids).logits, model(ids).logits, rtol=0, atol=0)
        assert offloaded(model).to("meta").get_input_embeddings()(ids).device.type == "meta"
