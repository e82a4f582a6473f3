"""Mixtures of experts: the fused experts are named and left alone, and the rest is adapted, saved and read as ever."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from qriemann.adapters.targets import check_targets, without_experts
from qriemann.errors import InputError
from tests.models import fill_lora
from tests.recipe_fixtures import make_tokenizer, run_cli

SHAPE = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MODELS = {
    # The first layer has an MLP of its own, the others experts.
    "one dense layer": (
        Qwen3MoeConfig,
        {"moe_intermediate_size": 24, "mlp_only_layers": [0], "head_dim": 16},
        ATTENTION,
    ),
    "a shared expert": (
        Qwen2MoeConfig,
        {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        ATTENTION | {"gate_proj", "up_proj", "down_proj"},
    ),
    "experts alone": (OlmoeConfig, {}, ATTENTION),
}


def make_model(name: str) -> AutoModelForCausalLM:
    kind, changes, _ = MODELS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**SHAPE, **changes}, pad_token_id=258, eos_token_id=257))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("targets", "kept"),
    [("all-linear", None), (r".*\.(q_proj|gate_up_proj)", {"q_proj"}), (["q_proj", "v_proj"], {"q_proj", "v_proj"})],
)
def test_no_adapter_sits_on_an_expert_and_plain_peft_reads_what_was_saved(name, targets, kept, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path / "base")
    asked = LoraConfig(r=2, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    config, line = without_experts(model, asked)
    check_targets(model, config)
    assert "mlp.experts.gate_up_proj" in line
    assert ("left without an adapter: model.layers.*.mlp.shared_expert_gate" in line) == (
        name == "a shared expert" and targets == "all-linear"
    )
    peft = get_peft_model(model, config)
    adapted = {key.rpartition(".")[2] for key, module in peft.named_modules() if hasattr(module, "lora_A")}
    assert adapted == (kept or MODELS[name][2])
    fill_lora(peft)
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, peft.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_a_model_without_experts_is_left_as_it_is(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(target_modules="all-linear")
    assert without_experts(model, config) == (config, None)
    assert config.target_modules == "all-linear"


def test_nothing_but_experts_is_refused():
    with pytest.raises(InputError, match="it has q_proj"):
        without_experts(make_model("experts alone"), LoraConfig(target_modules=["down_proj", "up_proj"]))


def test_plan_check_and_train_name_the_experts_and_go_on(tmp_path, settings, capsys, monkeypatch):
    make_model("one dense layer").save_pretrained(tmp_path / "experts")
    make_tokenizer().save_pretrained(tmp_path / "experts")
    values = {**settings, "model_name_or_path": str(tmp_path / "experts"), "quantize": "nf4", "max_steps": 1}
    values |= {"display": "plain", "eval_size": 0, "lora_r": 2, "max_length": 128, "use_cpu": True}
    monkeypatch.setenv("COLUMNS", "300")
    from qriemann import cli

    assert run_cli(tmp_path, values) == 0
    for command in ("train", "plan", "check"):
        if command != "train":
            assert cli.main([command, str(tmp_path / "run.yaml")]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "the experts, model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj" in printed
        assert "are neither quantized nor adapted" in printed
        assert "left without an adapter: model.layers.*.mlp.down_proj" in printed
