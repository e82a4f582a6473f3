"""The gradient's singular vectors that the probe finds, against the dense gradient; what the probe costs in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qriemann import Riemannion, attach, locally_optimal_
from qriemann.adapters.attach import lora_layers
from qriemann.adapters.gradient import gradient_svd
from qriemann.memory.live_bytes import LiveBytes
from tests.adapters.test_loi import BATCHES, KEPT, RANK, kept_shares, loss
from tests.models import (
    dense_gradients,
    dequantized,
    load_nf4,
    next_token_loss,
    relative,
    save_tiny_base,
    tiny_llama,
    token_batch,
    variants,
    with_lora,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def test_singular_values_are_those_of_the_dense_gradient_up_to_a_common_factor(folder):
    model = with_lora(load_nf4(folder), r=RANK)
    attach(model, start="zero", seed=5)
    found = gradient_svd(model, lora_layers(model), BATCHES, loss, oversampling=64, power_iterations=1, seed=0)
    gradients = dense_gradients(dequantized(model), model, BATCHES)
    factors = []
    for (name, _), triplets in zip(variants(model).items(), found, strict=True):
        expected = torch.linalg.svdvals(gradients[name])
        factors.append((triplets.sigma[0] / expected[0]).item())
        assert relative(triplets.sigma, factors[-1] * expected[: len(triplets.sigma)]) < 1e-5
    assert max(factors) / min(factors) == pytest.approx(1, rel=1e-5)


def test_one_power_iteration_is_enough_where_singular_values_fall_slowly():
    # Layers 256 wide and 32 columns: a random basis and its image, the earlier one forgotten, keep 0.983 in the worst layer.
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=200, num_key_value_heads=2, max_position_embeddings=128, **shape))
    batches = [token_batch(seed, rows=8, length=64, vocabulary=200) for seed in range(4)]
    model = with_lora(copy.deepcopy(base), r=8)
    locally_optimal_(model, batches, loss)
    assert min(kept_shares(model, base, batches, 16).values()) >= KEPT


def test_gradients_too_small_for_float16_are_found_all_the_same():
    def tiny_loss(model: nn.Module, ids: Tensor) -> Tensor:
        return 1e-4 * next_token_loss(model, ids)

    model = with_lora(tiny_llama().half(), r=RANK)
    # With the factor 1e-4 most entries are below float16's smallest number, 6e-8.
    locally_optimal_(model, BATCHES, tiny_loss)
    assert min(kept_shares(model, tiny_llama().half(), BATCHES, 2 * RANK).values()) >= KEPT


def test_oversampling_beyond_a_layer_is_cut_and_named_once(caplog):
    model = with_lora(tiny_llama(), r=24)
    locally_optimal_(model, BATCHES, loss)
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("gradient")]
    assert "oversampling 16 is cut" in line
    assert "4 layers" in line
    assert "k_proj, 32 x 64" in line
    assert min(kept_shares(model, tiny_llama(), BATCHES, 48).values()) >= KEPT


def test_dropout_is_off_and_batches_may_come_from_a_generator():
    with_dropout = with_lora(tiny_llama(), r=RANK, lora_dropout=0.5).train()
    for module in with_dropout.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    without = with_lora(tiny_llama(), r=RANK).eval()
    expected = locally_optimal_(without, BATCHES, loss)
    got = locally_optimal_(with_dropout, (ids for ids in BATCHES), loss)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.point().dense(), b.point().dense())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_stays_on_and_changes_no_number(reentrant):
    plain, checkpointed = (with_lora(tiny_llama(), r=RANK) for _ in range(2))
    checkpointed.enable_input_require_grads()
    checkpointed.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    checkpointed.base_model.model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(count)
    expected, got = (locally_optimal_(model.train(), BATCHES, loss) for model in (plain, checkpointed))
    assert forwards == 2 * 4 * len(BATCHES)  # each of the 4 passes runs it again in backward
    for a, b in zip(expected, got, strict=True):
        assert relative(b.point().dense(), a.point().dense()) < 1e-4


def test_the_probe_allocates_at_most_15_percent_more_than_a_training_step(folder):
    ids = [token_batch(seed, rows=8, length=48) for seed in (1, 2)]
    peaks = {}
    for kind in ("train", "probe"):
        model = with_lora(load_nf4(folder), r=RANK).train()
        attach(model, seed=5)
        optimizer = Riemannion(model, lr=1e-2)
        parameters = list(model.parameters())
        live = LiveBytes(parameters)
        live.window = kind
        with live:
            if kind == "probe":
                locally_optimal_(model, ids, loss)
            else:
                for batch in ids:
                    loss(model, batch).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        peaks[kind] = sum(p.nbytes for p in parameters) + sum(live.peaks[kind].values())
    assert peaks["probe"] <= 1.15 * peaks["train"]  # the bound of the issue
