"""The plan against the bytes that torch's allocator hands out in real steps, and its answers against themselves."""

import functools
import json

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
import yaml
from bitsandbytes.functional import dequantize_4bit
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from qriemann import Riemannion, cli
from qriemann.adapters.targets import adapter_config, without_experts
from qriemann.config import settings_from
from qriemann.errors import InputError
from qriemann.memory.footprint import GIB, Footprint, read_run
from qriemann.memory.plan import plan
from tests.memory.conftest import allocated_peak
from tests.models import load_nf4

# The promise of the plan; what is found is within half a percent.
PEAK_RTOL = 0.10


def shape(kind, vocabulary, hidden, mlp, layers, heads, kv_heads, positions=1024, **options):
    return kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        **options,
    )


MODELS = {
    # Grouped heads; at this width and depth the layers outweigh the loss if nothing is recomputed.
    "llama": shape(LlamaConfig, 300, 256, 768, 6, 8, 2, pad_token_id=0),
    # Never given weights: layers so wide that the loss is nothing beside them.
    "wide": shape(LlamaConfig, 300, 2048, 8192, 5, 16, 4),
    # Never given weights: embeddings that outweigh what a step computes.
    "wordy": shape(LlamaConfig, 60000, 256, 256, 2, 4, 4, 512),
    "qwen": shape(Qwen2Config, 500, 64, 160, 3, 4, 4, pad_token_id=0, tie_word_embeddings=True),
    "experts": shape(
        Qwen3MoeConfig,
        300,
        128,
        256,
        3,
        4,
        2,
        pad_token_id=0,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model with weights."""
    torch.manual_seed(0)
    made = {}
    for name, kind in (("llama", LlamaForCausalLM), ("qwen", Qwen2ForCausalLM), ("experts", Qwen3MoeForCausalLM)):
        made[name] = tmp_path_factory.mktemp(name)
        kind(MODELS[name]).save_pretrained(made[name])
    return made


@pytest.fixture
def make_config(tmp_path):
    """A configuration for a model of which there is nothing but config.json."""

    def make(model="llama", **settings):
        folder = tmp_path / model
        folder.mkdir(exist_ok=True)
        (MODELS[model] if isinstance(model, str) else model).save_pretrained(folder)
        return settings_from(
            {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "out"), "lora_r": 8, **settings}
        )

    return make


def held_bytes(model, points):
    """Bytes of the distinct tensors that a model with its adapter holds, quantization state included."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    for point in points:
        tensors += [point.s, *(point.offset or ())]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def hold_dequantized(base):
    """Makes the 4-bit layers compute with their dequantized weights, and returns the bytes of those."""
    held = 0
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            dense = dequantize_4bit(module.weight.data, module.weight.quant_state)
            module.forward = functools.partial(F.linear, weight=dense, bias=module.bias)
            held += dense.nbytes
    return held


CONFIGURATIONS = {
    "a deep model, all activations kept": ("llama", "nf4", 2, 128, False, True, False),
    "the same with checkpointing": ("llama", "nf4", 2, 128, True, True, False),
    "the same with dequantized copies": ("llama", "nf4", 2, 128, True, True, True),
    "one long row": ("llama", "nf4", 1, 512, False, False, False),
    "many short rows, checkpointing": ("qwen", "nf4", 8, 64, True, True, False),
    "an unquantized base": ("qwen", "none", 2, 256, False, True, True),
    "experts": ("experts", "nf4", 2, 256, False, True, False),
    "experts, checkpointing": ("experts", "none", 2, 256, True, True, False),
}


@pytest.mark.parametrize(
    ("name", "quantize", "batch", "length", "checkpointing", "padded", "dense"),
    CONFIGURATIONS.values(),
    ids=CONFIGURATIONS,
)
def test_the_planned_peak_is_the_allocators(
    name, quantize, batch, length, checkpointing, padded, dense, folders, make_config
):
    start = "offset" if padded else "zero"
    config = make_config(
        name,
        quantize=quantize,
        per_device_train_batch_size=batch,
        max_length=length,
        activation_checkpointing=checkpointing,
        eval_strategy="no",
        use_cpu=True,
        start=start,
    )
    base = load_nf4(folders[name]) if quantize == "nf4" else AutoModelForCausalLM.from_pretrained(folders[name])
    copies = hold_dequantized(base) if dense else 0
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(base, without_experts(base, adapter_config(config, offset=padded))[0])
    optimizer = Riemannion(model, start=start, seed=0)
    if checkpointing:
        base.activation_checkpointing_enable()
        base.enable_input_require_grads()
    model.train()
    ids = torch.randint(1, 200, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, length // 2 :] = 0

    def step():
        model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).loss.backward()

    result = plan(config, dense_copies=dense)
    stored = dict(result.stored)
    del stored["Python and libraries"], stored["optimizer state"]
    assert sum(stored.values()) == held_bytes(model, optimizer.points) + copies
    assert result.phase == "training"
    assert sum(size for _, size in result.computed) == pytest.approx(allocated_peak(step), rel=PEAK_RTOL)


def test_the_optimizer_state_is_what_the_optimizer_holds(folders, make_config):
    config = make_config("qwen", max_length=64)
    model = get_peft_model(load_nf4(folders["qwen"]), adapter_config(config, offset=False))
    optimizer = Riemannion(model, seed=0)
    blocks = [block for batch in optimizer._batches for block in batch.momentum]
    held = sum(block.numel() * block.element_size() for block in blocks)
    assert dict(plan(config).stored)["optimizer state"] == held


@pytest.mark.parametrize(("length", "checkpointing"), [(8, True), (512, False)])
def test_two_shallow_models_tell_what_the_whole_one_needs(length, checkpointing, make_config, monkeypatch):
    # At 8 tokens a layer's gradients outweigh the activations that it keeps, at 512 it is the other way round.
    config = make_config(
        "wide", max_length=length, activation_checkpointing=checkpointing, eval_strategy="no", quantize="none"
    )
    phase, parts = Footprint.computed(*read_run(config))
    monkeypatch.setattr(Footprint, "has_like_layers", lambda *_: False)
    counted_phase, counted = Footprint.computed(*read_run(config))
    assert phase == counted_phase
    assert parts.total() == pytest.approx(counted.total(), rel=0.01)


def test_the_longest_row_and_the_largest_batch_fit_and_the_next_do_not(make_config):
    settings = {"max_length": 256, "per_device_train_batch_size": 2, "eval_strategy": "no"}
    card = plan(make_config("qwen", **{**settings, "max_length": 520})).high / GIB
    result = plan(make_config("qwen", **settings), card)
    assert result.fits
    assert result.longest == 512
    assert result.largest_batch >= 2

    def fits(**change):
        return plan(make_config("qwen", **{**settings, **change})).high <= card * GIB

    assert fits(max_length=result.longest)
    assert not fits(max_length=result.longest + 128)
    assert fits(per_device_train_batch_size=result.largest_batch)
    assert not fits(per_device_train_batch_size=result.largest_batch + 1)


ROWS, EVALUATION = "per_device_train_batch_size", "per_device_eval_batch_size"
# What is too large, and a change after which it is not.
TOO_LARGE = {
    "a batch": ("qwen", {ROWS: 16, "eval_strategy": "no"}, {ROWS: 4}),
    "kept activations": (
        "wide",
        {ROWS: 1, "quantize": "none", "activation_checkpointing": False, "eval_strategy": "no"},
        {"activation_checkpointing": True},
    ),
    "an evaluation": ("qwen", {ROWS: 1, EVALUATION: 64}, {EVALUATION: 8}),
    "both": ("qwen", {ROWS: 16, EVALUATION: 64}, {ROWS: 2, EVALUATION: 4}),
    "rows": ("qwen", {ROWS: 1, "max_length": 1024, "eval_strategy": "no"}, {"max_length": 256}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "settings", "change"), TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_what_does_not_fit_does_with_the_change_that_is_named(model, settings, change, make_config):
    settings = {"max_length": 128, **settings}
    card = plan(make_config(model, **{**settings, **change})).high * 1.01 / GIB
    result = plan(make_config(model, **settings), card)
    assert not result.fits
    assert change.keys() <= result.remedy.keys()
    assert ("max_length" in result.remedy) == ("max_length" in change)
    mended = make_config(model, **{**settings, **result.remedy})
    assert plan(mended).high <= card * GIB
    rows, times = mended.trl[ROWS], mended.trl.get("gradient_accumulation_steps", 1)
    assert rows * times == settings[ROWS]


def test_embeddings_in_host_memory_free_their_bytes_on_a_gpu_and_none_on_the_cpu(make_config):
    for use_cpu, freed in ((False, 2 * 60000 * 256), (True, 0)):
        settings = {"max_length": 64, "use_cpu": use_cpu, "dtype": "bfloat16"}
        kept, offloaded = (plan(make_config("wordy", **settings, offload_embeddings=where)) for where in (False, True))
        assert kept.peak - offloaded.peak == freed
        assert offloaded.computed == kept.computed


def test_offloading_the_embeddings_is_named_where_it_is_enough(make_config):
    settings = {"max_length": 64, "eval_strategy": "no"}
    card = (plan(make_config("wordy", **settings, offload_embeddings=True)).high + 1024) / GIB
    result = plan(make_config("wordy", **settings), card)
    assert not result.fits
    assert result.remedy == {"offload_embeddings": True}
    assert plan(make_config("wordy", **settings, **result.remedy), card).fits


def test_packed_samples_need_the_mask_that_keeps_them_apart(make_config):
    packed = {
        "packing": True,
        "max_length": 512,
        "per_device_train_batch_size": 2,
        "eval_strategy": "no",
        "quantize": "none",
    }
    masked, unmasked = (
        sum(size for _, size in plan(make_config("wide", **packed, attn_implementation=attention)).computed)
        for attention in ("sdpa", "flash_attention_2")
    )
    # Two samples of 512 tokens in one row: a mask of 1024 x 1024 bytes, and the same as bf16 in the layer at work.
    assert masked - unmasked >= 3 * 1024**2


BAD = {
    "a card below the weights": ({}, 0.01, "does not fit 0.01 GiB"),
    "a card of no size": ({}, 0.0, "vram must be"),
    "no length": ({"max_length": None}, None, "max_length"),
    "no model": ({"model_name_or_path": None}, None, "model_name_or_path"),
    "a model that is not there": ({"model_name_or_path": "./no/such"}, None, "./no/such"),
    "targets that match nothing": ({"lora_target_modules": ["q_prj"]}, None, "q_prj"),
    "tied embeddings in host memory": (
        {"model": "qwen", "offload_embeddings": True},
        None,
        "offload_embeddings must be",
    ),
}


@pytest.mark.parametrize(("change", "vram", "part"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_planned_is_named(change, vram, part, make_config):
    with pytest.raises(InputError, match=part):
        plan(make_config(**{"max_length": 64, **change}), vram)


@pytest.mark.parametrize("kind", ["t5", "gemma3"])
def test_a_model_that_is_no_causal_language_model_of_text_is_refused(kind, make_config, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 100}))
    with pytest.raises(InputError, match="causal language model"):
        plan(make_config(model_name_or_path=str(tmp_path / "other"), max_length=64))


def test_dequantized_copies_that_do_not_fit_are_not_planned(make_config):
    config, row = make_config("qwen", max_length=64, use_cpu=True), "4-bit weights, dequantized for the CPU"
    whole = plan(config)
    assert dict(whole.stored)[row] == 4 * 3 * (4 * 64 * 64 + 3 * 160 * 64)
    for spare, dense in ((1024, True), (-1024, False)):
        result = plan(config, (whole.high + spare) / GIB)
        assert result.fits
        assert result.workload.dense_copies is dense
        assert (row in dict(result.stored)) is dense


def test_a_plan_says_what_the_merge_loads(folders, make_config):
    footprint, workload = read_run(make_config("llama", max_length=64, eval_strategy="no"))
    recorded, merged = footprint.merge_bytes(workload)
    trained, written = load_nf4(folders["llama"]), AutoModelForCausalLM.from_pretrained(folders["llama"])
    buffers = sum(buffer.nbytes for buffer in written.buffers())
    assert recorded == held_bytes(trained, []) - buffers
    assert merged == held_bytes(written, []) - buffers
    (note,) = (note for note in plan(make_config("llama", max_length=64)).assumptions if note.startswith("merge:"))
    assert f"{merged / GIB:.1f} GiB to prove the merged one" in note


def test_the_commands_print_the_peak_and_every_card(make_config, tmp_path, capsys):
    settings = {"max_length": 64, "eval_strategy": "no"}
    result = plan(make_config("qwen", **settings))
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({"model_name_or_path": result.model, "output_dir": "unused", "lora_r": 8, **settings})
    )
    assert cli.main(["plan", str(path), "--vram", "12"]) == 0
    printed = capsys.readouterr().out
    assert f"{result.peak / GIB:.2f}" in printed
    assert "fits 12 GiB" in printed
    assert cli.main(["plan", str(path), "--all-cards"]) == 0
    printed = capsys.readouterr().out
    for card in (8, 12, 16, 24, 32):
        assert f"{card} GiB" in printed
    assert cli.main(["plan", str(path), "--vram", "0.1"]) == 2
    assert not (tmp_path / "out").exists()
