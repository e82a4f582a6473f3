"""Putting an adapter on the manifold changes no function, loses nothing, and refuses what it cannot do by name."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from qriemann import InputError, Riemannion, attach, load_base
from qriemann.adapters.attach import truncate_
from qriemann.geometry.parameter import orthonormality_drift
from tests.models import (
    fill_lora,
    logits,
    move_points,
    next_token_loss,
    relative,
    save_tiny_base,
    take_steps,
    tiny_llama,
    token_batch,
    variants,
    with_lora,
    word_tokenizer,
)

# U, S and V are rounded to float32 once each.
ADOPTION_RTOL = 1e-6
# s X x and s X_0 x cancel, each with a float32 error of some 1e-7 of |X x|; alpha = 1 makes X as large as it gets.
OFFSET_START_RTOL = 1e-5


def test_a_zero_start_leaves_the_function_as_it_is_to_the_bit():
    model = with_lora(tiny_llama(bias=True))
    expected = logits(model)
    attach(model, start="zero")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 9}}], ids=str)
def test_an_offset_start_leaves_the_function_as_it_is(alpha, options):
    model = with_lora(tiny_llama(), **options)
    expected = logits(model)
    points = attach(model, start="offset", alpha=alpha, seed=0)
    assert relative(logits(model), expected) < OFFSET_START_RTOL
    for point in points:
        assert torch.equal(point.s, alpha * torch.eye(point.rank))
        assert relative(point.offset.dense(), point.point().dense()) == 0


@pytest.mark.parametrize("start", ["zero", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_holds_something_is_adopted_exactly(start, dtype):
    model = with_lora(tiny_llama(), r=5)
    fill_lora(model)
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_variant"):
            b, a = (getattr(module, f"lora_{f}")["default"].weight for f in "BA")
            if name.endswith("k_proj"):
                b.data[:, 2] = b.data[:, 0]  # rank 4
            if name.endswith("v_proj"):
                b.data[:, 1:] = 0  # rank 1
            a.data, b.data = a.data.to(dtype), b.data.to(dtype)
            expected[name] = b.detach().double() @ a.detach().double()
    points = attach(model, start=start)
    assert orthonormality_drift(points) < 1e-6
    for name, (_, point) in variants(model).items():
        assert point.offset is None
        assert relative(point.point().dense(), expected[name]) < ADOPTION_RTOL, name


def test_the_same_seed_gives_the_same_bases_and_leaves_torchs_own_generator_alone():
    models = [with_lora(tiny_llama()) for _ in range(3)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    same, again, other = (attach(m, start="offset", seed=s) for m, s in zip(models, (7, 7, 8), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(a.u, b.u) and torch.equal(a.v_transposed, b.v_transposed) for a, b in zip(same, again, strict=True)
    )
    assert relative(other[0].u, same[0].u) > 0.5


@pytest.mark.parametrize("start", ["zero", "offset"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_deep_copy_trains_as_the_original_does_and_apart_from_it(start, trained):
    original = with_lora(tiny_llama())
    attach(original, start=start, seed=0)
    if trained:  # the factors are views of the optimizer's buffers then
        take_steps(original, Riemannion(original, lr=0.05), [4])
    twin = copy.deepcopy(original)
    expected = logits(original)
    assert torch.equal(logits(twin), expected)

    optimizer = Riemannion(twin, lr=0.05)
    take_steps(twin, optimizer, range(3))
    assert torch.equal(logits(original), expected)
    assert relative(logits(twin), expected) > 1e-3
    assert optimizer.orthonormality_drift() < 1e-5
    assert {id(point) for point in optimizer.points} == {id(point) for _, point in variants(twin).values()}
    take_steps(original, Riemannion(original, lr=0.05), range(3))
    # The same numbers through the same operations.
    assert torch.equal(logits(original), logits(twin))


def test_moving_the_model_moves_what_is_no_modules_buffer():
    model = with_lora(tiny_llama())
    points = attach(model, start="offset", seed=0)
    move_points(points)
    expected = logits(model)
    optimizer = Riemannion(model, lr=0.05)
    assert torch.equal(logits(model.to("cpu")), expected)
    # A new storage for every parameter, as a move to a device and back makes it.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    next_token_loss(model, token_batch()).backward()
    before = [point.point().dense() for point in points]
    optimizer.step()
    for point, dense in zip(points, before, strict=True):
        assert 1e-4 < relative(point.point().dense(), dense) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("start", ["zero", "offset"])
def test_a_model_moved_to_the_gpu_computes_and_trains_there(start):
    model = with_lora(tiny_llama())
    points = attach(model, start=start, seed=0)
    move_points(points)
    expected = logits(model)
    model.to("cuda")
    ids = token_batch().cuda()
    with torch.no_grad():
        assert relative(model(ids).logits.cpu(), expected) < 1e-4  # other kernels, TF32 off by default
    next_token_loss(model, ids).backward()
    optimizer = Riemannion(model, lr=0.05)
    optimizer.step()
    assert optimizer.orthonormality_drift() < 1e-5
    assert {t.device.type for p in points for t in p.point()} == {"cuda"}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_bias": True}, {"r": 1}], ids=str)
@pytest.mark.parametrize("start", ["zero", "offset"])
def test_loading_into_an_attached_model_gives_the_saved_points(start, options):
    # What a trainer's load_best_model_at_end does.
    saved, model = (with_lora(tiny_llama(bias=True), **options) for _ in range(2))
    saved_points, points = attach(saved, start=start, seed=0), attach(model, start=start, seed=5)
    move_points(saved_points)
    move_points(points, seed=77)
    for name, parameter in saved.named_parameters():
        if "lora_B.default.bias" in name:
            nn.init.normal_(parameter)
    assert relative(logits(model), logits(saved)) > 1e-2
    model.load_state_dict(saved.state_dict())
    for point, expected in zip(points, saved_points, strict=True):
        assert relative(point.point().dense(), expected.point().dense()) < ADOPTION_RTOL
        if start == "offset":
            assert relative(point.offset.dense(), expected.offset.dense()) < ADOPTION_RTOL
    assert relative(logits(model), logits(saved)) < 1e-5
    assert orthonormality_drift(points) < 1e-6


@pytest.mark.parametrize("start", ["zero", "offset"])
def test_loading_an_adapter_of_the_other_start_is_refused_by_name(start):
    saved, model = (with_lora(tiny_llama()) for _ in range(2))
    attach(saved, start=start)
    attach(model, start="offset" if start == "zero" else "zero", seed=0)
    expected = logits(model)
    with pytest.raises(InputError, match=r"layers\.0.* has another start than the adapter of rank \d.*fresh model"):
        model.load_state_dict(saved.state_dict())
    assert torch.equal(logits(model), expected)


# Refusals.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.wide = nn.Linear(6, 40)
        self.narrow = nn.Linear(40, 3)

    def forward(self, ids):
        return self.narrow(self.wide(self.conv(self.embed(ids).mT).mT))


def net(**options) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Net(), LoraConfig(**{"r": 2, **options}))


def two_active() -> PeftModel:
    model = net(target_modules=["wide"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["wide"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def broken(value: float) -> PeftModel:
    model = net(target_modules=["wide", "narrow"])
    model.base_model.model.narrow.lora_A["default"].weight.data[0, 1] = value
    return model


def half_filled() -> PeftModel:
    model = net(target_modules=["wide", "narrow"])
    nn.init.normal_(model.base_model.model.wide.lora_B["default"].weight)
    return model


def another_tuner() -> PeftModel:
    from peft import IA3Config

    return get_peft_model(Net(), IA3Config(target_modules=["wide"], feedforward_modules=["wide"]))


REFUSED = {
    "DoRA": (lambda: net(target_modules=["wide", "narrow"], use_dora=True), {}, r"base_model\.model\.wide.*Dora"),
    "a conv layer": (lambda: net(target_modules=["wide", "conv"]), {}, r"model\.conv.*Conv1d.*target_modules"),
    "an embedding": (lambda: net(target_modules=["wide", "embed"]), {}, r"model\.embed.*Embedding.*target_modules"),
    "two active adapters": (two_active, {}, r"\['default', 'second'\].*model\.wide.*set_adapter"),
    "a rank above min(m, n)": (
        lambda: net(r=4, target_modules=["wide", "narrow"]),
        {},
        r"for base_model\.model\.narrow \(3 x 40\), got 4; see rank_pattern",
    ),
    "no PEFT model": (Net, {}, "must have a LoRA adapter on a linear layer.*get_peft_model"),
    "no LoRA": (another_tuner, {}, "IA3|Linear.*only LoRA"),
    "a misspelt start": (lambda: net(target_modules=["wide"]), {"start": "ofset"}, "'zero', 'offset', got 'ofset'"),
    "alpha NaN": (lambda: net(target_modules=["wide"]), {"start": "offset", "alpha": float("nan")}, "alpha.*nan"),
    "infinite factors": (lambda: broken(float("inf")), {}, r"model\.narrow must hold finite"),
    "an offset for half of the layers": (
        half_filled,
        {"start": "offset"},
        r"in every layer or in none; 1 of 2 are zero",
    ),
}


@pytest.mark.parametrize(("build", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_is_refused_by_name_and_left_as_it_was(build, options, message):
    model = build()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    registered = {
        name: dict(module.lora_variant) for name, module in model.named_modules() if hasattr(module, "lora_variant")
    }
    with pytest.raises(InputError, match=message):
        attach(model, **options)
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.allclose(state[key], after[key], rtol=0, atol=0, equal_nan=True) for key in state)
    for name, module in model.named_modules():
        if hasattr(module, "lora_variant"):
            assert module.lora_variant == registered[name]
            assert module.cast_input_dtype_enabled
    assert not any(hasattr(parameter, "fixed_rank") for parameter in model.parameters())


def test_a_base_from_load_base_takes_a_checkpoint_with_an_offset_without_a_callback(tmp_path):
    # What the trainer does when it resumes: PEFT loads rank 2 r into layers of rank r, then the optimizer is made.
    folder = save_tiny_base(tmp_path / "base")
    word_tokenizer().save_pretrained(folder)
    ids = token_batch()
    saved = with_lora(load_base(folder, quantize=None)[0])
    move_points(attach(saved, start="offset", seed=0))
    saved.save_pretrained(tmp_path / "adapter")
    resumed = with_lora(load_base(folder, quantize=None)[0])
    resumed.load_adapter(tmp_path / "adapter", "default")
    attach(resumed, start="offset", seed=1)
    torch.testing.assert_close(resumed(ids).logits, saved(ids).logits, rtol=0, atol=1e-5)


# What PEFT saves.


def trained(model: nn.Module) -> torch.Tensor:
    """The logits after two steps of the active adapter, which is put on the manifold with an offset."""
    optimizer = Riemannion(model, lr=0.1, start="offset")
    take_steps(model, optimizer, range(2))
    return logits(model)


def second_config(model: PeftModel) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    "config", [second_config, lambda model: model.peft_config["default"]], ids=["its own config", "the first one's"]
)
def test_each_of_two_adapters_with_an_offset_is_saved_so_that_plain_peft_loads_it(config, tmp_path):
    model = with_lora(tiny_llama())
    expected = {"default": trained(model)}
    # The name of the second is that of one that was trained and deleted.
    for deleted in (True, False):
        model.add_adapter("second", config(model))
        model.set_adapter("second")
        expected["second"] = trained(model)
        if deleted:
            model.set_adapter("default")
            model.delete_adapter("second")
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        reloaded = PeftModel.from_pretrained(tiny_llama(), folder)
        assert relative(logits(reloaded), expected[adapter]) < 1e-5


def test_a_plain_adapter_beside_an_attached_one_works_on_a_bf16_base(tmp_path):
    plain = with_lora(tiny_llama())
    fill_lora(plain)
    plain.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path)
    model = with_lora(tiny_llama().bfloat16())
    trained(model)
    model.load_adapter(tmp_path, "plain")
    model.set_adapter("plain")
    assert torch.equal(logits(model), logits(alone))


@pytest.mark.parametrize("start", ["zero", "offset"])
def test_a_model_with_an_injected_adapter_saves_what_transformers_loads(start, tmp_path):
    # diffusers' add_adapter injects in the same way.
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    attach(model, start=start)
    expected = trained(model)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = type(model).from_pretrained(tmp_path / "base")
    reloaded.load_adapter(str(tmp_path / "adapter"))
    assert relative(logits(reloaded), expected) < 1e-5


def test_an_offset_is_refused_where_no_config_can_say_the_rank():
    part = with_lora(tiny_llama()).base_model.model.model.layers
    with pytest.raises(InputError, match=r"the model that holds the adapter's config; a ModuleList has none"):
        attach(part, start="offset")
    assert attach(part, start="zero")
    assert attach(part)  # nothing is to be done any more


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0))


GPT2_LORA = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}}),
        (tiny_llama, {"r": 32}),  # all rows of k_proj and v_proj
        (gpt2, GPT2_LORA),
    ],
    ids=["llama", "patterns", "full rank", "fan_in_fan_out"],
)
def test_a_truncated_adapter_is_the_best_of_its_rank_and_is_saved_at_it(base, options, tmp_path):
    model = with_lora(base(), **options)
    trained(model)
    expected, errors = {}, {}
    for name, (_, point) in variants(model).items():
        left, sigma, right = torch.linalg.svd(point.point().dense() - point.offset.dense(), full_matrices=False)
        r = point.rank
        expected[name] = (left[:, :r] * sigma[:r]) @ right[:r]
        errors[name] = (sigma[r:].norm() / sigma.norm()).item()
    # r of the 2 r directions go: something, unless r spans the layer.
    assert max(errors.values()) > 0.01
    assert truncate_(model) == pytest.approx(errors, rel=1e-4, abs=1e-6)
    points = {name: point for name, (_, point) in variants(model).items()}
    assert orthonormality_drift(points.values()) < 1e-6
    for name, point in points.items():
        assert point.offset is None
        assert relative(point.point().dense(), expected[name]) < 1e-5
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base(), tmp_path)
    assert (reloaded.peft_config["default"].r, reloaded.peft_config["default"].rank_pattern) == (
        options.get("r", 4),
        options.get("rank_pattern", {}),
    )
    assert relative(logits(reloaded), logits(model)) < 1e-5


def test_truncating_changes_nothing_without_an_offset_and_is_refused_without_a_point():
    model = with_lora(tiny_llama())
    with pytest.raises(InputError, match="has no adapter on the fixed-rank manifold"):
        truncate_(model)
    points = attach(model, start="zero")
    expected = trained(model)
    assert set(truncate_(model).values()) == {0.0}
    assert len(points) == 14
    assert torch.equal(logits(model), expected)
