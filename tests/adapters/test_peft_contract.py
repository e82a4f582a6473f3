"""What qriemann relies on in PEFT beyond its public interface. If one of these fails, PEFT has changed: see layer.py."""

from __future__ import annotations

import inspect

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from safetensors.torch import load_file
from torch import nn

from qriemann.adapters.layer import FixedRankVariant
from tests.models import fill_lora, load_nf4, relative, save_tiny_base, tiny_llama, token_batch, with_lora

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


def test_a_disabled_adapter_does_not_call_its_variant(model):
    layer = model.get_submodule(LAYER)
    layer.lora_variant["default"] = AddsOne()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))


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


def test_what_a_state_dict_hook_writes_is_what_save_pretrained_saves(model, tmp_path):
    layer = model.get_submodule(LAYER)

    def hook(module, state_dict, prefix, local_metadata):
        state_dict[f"{prefix}lora_B.default.weight"] = torch.full((96, 6), 7.0)

    layer.register_state_dict_post_hook(hook)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved[f"{LAYER}.lora_B.weight"], torch.full((96, 6), 7.0))


def test_what_a_load_hook_puts_in_is_what_load_adapter_loads(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    layer = model.get_submodule(LAYER)

    def hook(module, state_dict, prefix, *args):
        state_dict[f"{prefix}lora_B.default.weight"] = torch.full((96, 4), 7.0)

    layer.register_load_state_dict_pre_hook(hook)
    model.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert torch.equal(layer.lora_B["default"].weight.data, torch.full((96, 4), 7.0))


def test_a_layer_says_all_that_the_variant_needs(model):
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, LoraLayer)
    assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == (4, 8, 2.0)
    assert (layer.out_features, layer.in_features) == (96, 64)
    assert layer.use_rslora["default"] is False
    x = torch.ones(64)
    assert torch.equal(layer.lora_dropout["default"](x), x)
    assert (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape) == ((4, 64), (96, 4))


def test_the_saved_config_is_the_models_own(model, tmp_path):
    config = model.peft_config["default"]
    config.r, config.lora_alpha = 11, 13
    model.save_pretrained(tmp_path / "adapter")
    stored = type(config).from_pretrained(tmp_path / "adapter")
    assert (stored.r, stored.lora_alpha) == (11, 13)
    # Existing layers go on with what they were built with.
    assert model.get_submodule(LAYER).scaling["default"] == 2.0


def test_lora_scaling_is_alpha_over_r_or_its_root():
    plain, root = (with_lora(tiny_llama(), r=4, lora_alpha=8, use_rslora=flag) for flag in (False, True))
    assert plain.get_submodule(LAYER).scaling["default"] == 8 / 4
    assert root.get_submodule(LAYER).scaling["default"] == 8 / 2
    ids = token_batch()
    for model in (plain, root):
        fill_lora(model)
    reference = tiny_llama()
    with torch.no_grad():
        assert relative(root(ids).logits, reference(ids).logits) > relative(plain(ids).logits, reference(ids).logits)
