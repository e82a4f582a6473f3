"""Models and rows for `measure on_a_card`: random weights, no download, and the report that grows line by line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.quantization_config import QuantizationMethod

from qriemann.folder.files import replace_text
from qriemann.upstream import protect_quantized_weights

_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Report:
    """What is known so far, in a file that is replaced with every fact.

    Attributes:
        part: that the facts are of.
        small: sizes for a rehearsal on the CPU.
    """

    path: Path
    part: str
    device: torch.device
    small: bool
    content: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.content = json.loads(self.path.read_text("utf-8"))
        self.facts: dict[str, Any] = self.content["parts"].setdefault(self.part, {"facts": {}})["facts"]

    def tell(self, name: str, value: Any, *, at_most: float | None = None, right: bool | None = None) -> None:
        """Keeps and prints a figure; with a bound, or with `right`, also whether it is as it should be."""
        if at_most is not None:
            right = value <= at_most
        self.facts[name] = {"value": value, "at_most": at_most, "right": right}
        replace_text(self.path, json.dumps(self.content, indent=1) + "\n")
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        bound = "" if at_most is None else f" (at most {at_most:g})"
        print(
            f"  {'wrong' if right is False else 'ok   ' if right else '     '} {name}: {shown:.300}{bound}", flush=True
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with ChatML's template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def llama_config(hidden: int, layers: int, *, vocabulary: int | None = None, **changes: Any) -> LlamaConfig:
    tokenizer = byte_tokenizer()
    heads = max(hidden // 128, 2)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary or len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaConfig(**{**settings, **changes})


def big_config(small: bool, layers: int = 32) -> LlamaConfig:
    """The shape of Llama 3.1 8B, or a little one with the same proportions of heads."""
    if small:
        return llama_config(64, min(layers, 4), num_attention_heads=4, num_key_value_heads=1)
    sizes = {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    return llama_config(4096, layers, vocabulary=128256, **sizes)


def save_llama(folder: Path, config: LlamaConfig, dtype: torch.dtype) -> Path:
    """A folder that `load_base` takes."""
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_4bit(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama whose linear layers are random NF4, made where they stay: no weights on disk, no copy in floats."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is model.lm_head:
            continue
        weight = torch.randn(module.weight.shape, device=device, dtype=dtype) * config.initializer_range
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        layer = Linear4bit(module.in_features, module.out_features, False, dtype, True, "nf4", device="meta")
        layer.weight = Params4bit(packed, False, state, quant_type="nf4", module=layer, bnb_quantized=True)
        layer.quant_state, layer.compute_type_is_set = state, True
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.ones if parameter.dim() == 1 else torch.randn
                filled = value(parameter.shape, device=device, dtype=dtype) * (1 if parameter.dim() == 1 else 0.02)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.requires_grad_(False)
    # What transformers sets on a model that it quantizes, and PEFT, TRL and the Trainer ask for.
    model.is_loaded_in_4bit, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    protect_quantized_weights(model)
    return model.eval()


def token_rows(count: int, lengths: list[int], vocabulary: int, seed: int = 0) -> Dataset:
    """Rows of random tokens, of these lengths in turn."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(2, vocabulary, (lengths[i % len(lengths)],), generator=generator).tolist() for i in range(count)
    ]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def write_chat_rows(path: Path, count: int) -> Path:
    """Questions and answers, of lengths that differ."""
    turns = [(f"say {n * n}", f"it is {n} " * (1 + n % 5)) for n in range(count)]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
