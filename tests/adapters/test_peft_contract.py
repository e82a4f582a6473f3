"""What qriemann relies on in PEFT beyond its public interface; where one fails, PEFT has changed: see qriemann/upstream."""

from __future__ import annotations

import inspect

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn

from qriemann.adapters.layer import FixedRankVariant
from tests.models import fill_lora, load_nf4, save_tiny_base, tiny_llama, with_lora

LAYER = "base_model.model.model.layers.1.mlp.up_proj"


class AddsOne(LoraVariant):
    """A variant whose effect no LoRA arithmetic can have; it remembers the input's dtype."""

    seen: torch.dtype | None = None

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        module.lora_variant[active_adapter].seen = x.dtype
        return result + 1


@pytest.mark.parametrize("method", ["forward", "merge_safe", "merge_unsafe", "unmerge"])
def test_a_variant_is_called_with_the_arguments_it_is_written_for(method):
    theirs, ours = (list(inspect.signature(getattr(c, method)).parameters) for c in (LoraVariant, FixedRankVariant))
    assert ours == theirs
    assert isinstance(inspect.getattr_static(LoraVariant, method), staticmethod)


@pytest.fixture(params=["linear", "4-bit"])
def model(request, tmp_path) -> PeftModel:
    base = tiny_llama() if request.param == "linear" else load_nf4(save_tiny_base(tmp_path))
    model = with_lora(base)
    fill_lora(model)
    kind = bnb.nn.Linear4bit if request.param == "4-bit" else nn.Linear
    assert type(model.get_submodule(LAYER).get_base_layer()) is kind
    return model


def test_a_variant_replaces_the_forward_of_its_layer(model):
    layer = model.get_submodule(LAYER)
    layer.lora_variant["default"] = AddsOne()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # + 1 on the same base output.
        assert torch.equal(layer(x), layer.base_layer(x) + 1)


def test_the_input_keeps_its_dtype_only_where_casting_is_switched_off(model):
    layer = model.get_submodule(LAYER)
    layer.lora_variant["default"] = variant = AddsOne()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer.base_layer.to(torch.bfloat16) if type(layer.base_layer) is nn.Linear else None
    with torch.no_grad():
        layer(x)
        assert variant.seen == torch.float32
        layer.cast_input_dtype_enabled = False
        layer(x)
        assert variant.seen == torch.bfloat16


def test_a_layer_says_all_that_the_variant_needs(model):
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, LoraLayer)
    assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == (4, 8, 2.0)
    assert (layer.out_features, layer.in_features) == (96, 64)
    assert layer.use_rslora["default"] is False
    x = torch.ones(64)
    assert torch.equal(layer.lora_dropout["default"](x), x)
    assert (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape) == ((4, 64), (96, 4))
