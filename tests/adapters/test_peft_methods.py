"""PEFT's own methods on attached layers, against W + s (X - X_0) made dense in float64."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import qriemann
from qriemann import InputError, attach
from qriemann.upstream import protect_quantized_weights
from tests.models import (
    load_nf4,
    logits,
    move_points,
    next_token_loss,
    relative,
    save_tiny_base,
    tiny_llama,
    token_batch,
    variants,
    with_lora,
)

# Float32 sums and products of factors of norm 1; measured at most 2e-6.
RTOL = 1e-5
STARTS = ["zero", "offset"]
OPTIONS = [{}, {"use_rslora": True, "rank_pattern": {r"layers\.1.*q_proj": 7}}, {"use_rslora": True, "lora_bias": True}]


def attached(start: str, *, seed: int = 0, base: nn.Module | None = None, **options) -> PeftModel:
    """A model whose points have moved; the biases of its adapter, if it has any, are not zero."""
    model = with_lora(base or tiny_llama(bias=True), **options)
    points = attach(model, start=start, seed=seed)
    move_points(points, seed=seed + 3)
    for name, parameter in model.named_parameters():
        if "lora_B.default.bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def changes(model: PeftModel) -> dict[str, Tensor]:
    """s (X - X_0) of each attached layer, dense, in float64."""
    found = {}
    for name, (module, point) in variants(model).items():
        x = point.point().dense() - (0 if point.offset is None else point.offset.dense())
        found[name] = x.double() * module.scaling["default"]
    return found


def deltas(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_variant")}
    return {name: layer.get_delta_weight(adapter) for name, layer in layers.items() if adapter in layer.lora_A}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert relative(tensor, expected[name]) < RTOL, name


@pytest.fixture(params=[(s, o) for s in STARTS for o in OPTIONS], ids=str)
def model(request) -> PeftModel:
    start, options = request.param
    return attached(start, **options)


def test_get_delta_weight_is_what_the_layer_adds(model):
    assert_near(deltas(model, "default"), changes(model))


def test_merging_and_unmerging_change_the_weights_by_what_the_layer_adds(model):
    expected, dense = logits(model), changes(model)
    before = {name: module.get_base_layer().weight.clone() for name, (module, _) in variants(model).items()}
    model.merge_adapter()
    merged = {name: module.get_base_layer().weight - before[name] for name, (module, _) in variants(model).items()}
    assert_near(merged, dense)
    assert relative(logits(model), expected) < RTOL
    model.unmerge_adapter()
    for name, (module, _) in variants(model).items():
        assert relative(module.get_base_layer().weight, before[name]) < 1e-6
    assert relative(logits(model), expected) < RTOL


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_gives_the_dense_model(model, safe):
    expected, dense = logits(model), changes(model)
    before = {name: module.get_base_layer().weight.detach().double() for name, (module, _) in variants(model).items()}
    merged = model.merge_and_unload(safe_merge=safe)
    for name, change in dense.items():
        weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        assert relative(weight - before[name], change) < RTOL
    assert relative(logits(merged), expected) < RTOL


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
@pytest.mark.parametrize("start", STARTS)
def test_a_merge_into_4_bit_is_that_of_the_saved_adapter(start, tmp_path):
    folder = save_tiny_base(tmp_path / "base")
    model = attached(start, base=load_nf4(folder))
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(load_nf4(folder), tmp_path / "adapter").eval()
    protect_quantized_weights(reloaded)
    # The codes next to a boundary may differ, so the logits do not agree to 1e-5.
    assert relative(logits(model.merge_and_unload()), logits(reloaded.merge_and_unload())) < 0.02


USES = {
    "add_weighted_adapter": lambda model, folder: model.add_weighted_adapter(
        ["default", "plain"], [0.7, -0.4], "sum", "cat"
    ),
    "hotswap_adapter": lambda model, folder: hotswap_adapter(model, str(folder), "default", torch_device="cpu"),
    "prepare_model_for_compiled_hotswap": lambda model, folder: prepare_model_for_compiled_hotswap(
        model, target_rank=16
    ),
}


@pytest.mark.parametrize(("name", "use"), USES.items(), ids=USES.keys())
def test_what_uses_the_factors_themselves_is_refused_until_the_model_is_detached(name, use, tmp_path):
    attached("offset", seed=5).save_pretrained(tmp_path)
    model = attached("offset")
    model.load_adapter(tmp_path, "plain")
    expected, found = logits(model), variants(model)
    with pytest.raises(InputError, match=rf"^{name} .*these layers are on the manifold.*qriemann\.detach"):
        use(model, tmp_path)
    assert torch.equal(logits(model), expected)
    assert variants(model) == found
    dense, other = changes(model), deltas(model, "plain")
    use(qriemann.detach(model), tmp_path)
    if "sum" in model.peft_config:
        assert_near(deltas(model, "sum"), {name: 0.7 * dense[name] - 0.4 * other[name].double() for name in dense})


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("beside", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_adapters_beside_an_attached_one_come_and_go(start, beside):
    model = attached(start)
    expected, dense = logits(model), changes(model)
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **beside)
    reference = with_lora(tiny_llama(bias=True))
    for one in (model, reference):
        torch.manual_seed(8)
        one.add_adapter("beside", copy.deepcopy(config))
        one.set_adapter("beside")
        one.eval()
    assert relative(logits(model), logits(reference)) < RTOL
    assert relative(logits(model), expected) > 1e-3
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("beside")
    assert torch.equal(logits(model), expected)
    assert_near(deltas(model, "default"), dense)


# PEFT 0.21 takes the bias of a LoRA layer for a broken factor.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape")
def test_a_detached_model_is_plain_lora_of_the_saved_rank(model, tmp_path):
    expected, dense = logits(model), changes(model)
    model.save_pretrained(tmp_path / "before")
    assert qriemann.detach(model) is model
    assert relative(logits(model), expected) < RTOL
    for name, module in model.named_modules():
        if hasattr(module, "lora_variant"):
            assert not module.lora_variant
            factors = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
            assert relative(factors * module.scaling["default"], dense[name]) < RTOL
            assert module.r["default"] == module.lora_A["default"].weight.shape[0]
    model.save_pretrained(tmp_path / "after")
    for folder in ("before", "after"):
        reloaded = PeftModel.from_pretrained(tiny_llama(bias=True), tmp_path / folder).eval()
        assert relative(logits(reloaded), expected) < RTOL
    # Plain training reaches the factors, and they can be put back on the manifold at the rank that they have.
    next_token_loss(model, token_batch()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    moved = logits(model)
    assert relative(moved, expected) > 1e-4
    attach(model)
    assert relative(logits(model), moved) < RTOL
    model.save_pretrained(tmp_path / "again")
    reloaded = PeftModel.from_pretrained(tiny_llama(bias=True), tmp_path / "again").eval()
    assert relative(logits(reloaded), moved) < RTOL


def test_an_ordinary_model_is_left_as_it_is():
    model = with_lora(tiny_llama())
    weights = list(model.parameters())
    assert all(a is b for a, b in zip(qriemann.detach(model).parameters(), weights, strict=True))


def test_the_saved_rank_is_said_where_it_is_not_the_configured_one(caplog):
    model = with_lora(tiny_llama(), r=3)
    with caplog.at_level(logging.WARNING):
        attach(model, start="zero")
        assert not caplog.records
        model = with_lora(tiny_llama(), r=3)
        attach(model, start="offset")
        attach(model, start="offset")
    (record,) = caplog.records
    assert "saved with r = 6, a point of r = 3" in record.getMessage()
