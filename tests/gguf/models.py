"""A small random model of every type that can become GGUF, and a tokenizer whose cuts llama.cpp knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qriemann.gguf.architectures import Layout
from qriemann.gguf.write import write_model
from tests.recipe_fixtures import make_tokenizer

VOCABULARY = 272


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Cut as GPT-2 does, with a ChatML template."""
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("1", "2"), ("12", "3"), ("'", "s")]
    return make_tokenizer(merges=merges, words=True)


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 265,
    "bos_token_id": None,
    "eos_token_id": 264,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WINDOWED = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
# What each type has beyond that; a name after a dot tells variants of a type apart.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama.tied": {"tie_word_embeddings": True},
    "llama.llama3": {"rope_parameters": _LLAMA3},
    "llama.linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama.biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 64},
    "smollm3": {"tie_word_embeddings": True},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": _WINDOWED,
    "gemma3_text": {**_WINDOWED, "num_hidden_layers": 7},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "phi3": {"sliding_window": None, "bos_token_id": 1},
    "olmo2": {},
}


def random_model(name: str, seed: int = 0, rows: int = VOCABULARY, **changes: Any) -> PreTrainedModel:
    """A model of the type in float32 with so many rows of embeddings; no norm is one and no bias zero."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        name.partition(".")[0], **{**_SMALL, **CONFIGS[name], "vocab_size": rows, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def write_whole(model: PreTrainedModel, path: Path, tokenizer: Any = None, kind: str = "f32") -> Path:
    """The model as a GGUF file of the type."""
    tensors = {key: parameter.detach() for key, parameter in model.named_parameters()}
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    write_model(path, Layout(model), tokenizer or byte_tokenizer(), shapes, tensors.__getitem__, kind, name="tiny")
    return path
