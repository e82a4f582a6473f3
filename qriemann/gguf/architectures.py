"""How llama.cpp holds each type of model: its name for it, its hyperparameters, and what it does to the weights.

A type without a row is refused: a file that llama.cpp computes with otherwise than transformers would load all the same.
tests/gguf/test_architectures.py runs a random model of every row in llama.cpp and compares.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from qriemann.errors import InputError

CONVERT = "merge the adapter, and convert the folder with llama.cpp's convert_hf_to_gguf.py"


def _granite(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _smollm3(writer: gguf.GGUFWriter, config: Any) -> None:
    _require(config, "no_rope_layers", [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)])


def _gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    _require(config, "query_pre_attn_scalar", config.head_dim)
    _require(config, "layer_types", _every(2, config))
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    _require(config, "query_pre_attn_scalar", config.head_dim)
    _require(config, "layer_types", _every(6, config))
    _require(config, "final_logit_softcapping", None)
    _require(config, "attn_logit_softcapping", None)
    _require(config, "rope_theta of the local layers", 1e4, config.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_sliding_window(config.sliding_window)


def _phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        id: llama.cpp's.
        permuted: the rows of q and k pair each half's first with each half's second, where transformers has the halves.
        plus_one: a norm's weight is stored plus one.
        windows: llama.cpp computes sliding windows for it.
        gelu: llama.cpp looks its activation up in a table of float16 numbers.
        more: writes what this type has beyond what all have.
    """

    id: gguf.MODEL_ARCH
    permuted: bool = False
    plus_one: bool = False
    windows: bool = False
    gelu: bool = False
    more: Callable[[gguf.GGUFWriter, Any], None] = lambda writer, config: None


_ARCH = gguf.MODEL_ARCH
ARCHITECTURES = {
    "gemma": Architecture(_ARCH.GEMMA, plus_one=True, gelu=True),
    "gemma2": Architecture(_ARCH.GEMMA2, plus_one=True, gelu=True, windows=True, more=_gemma2),
    "gemma3_text": Architecture(_ARCH.GEMMA3, plus_one=True, gelu=True, windows=True, more=_gemma3),
    "granite": Architecture(_ARCH.GRANITE, permuted=True, more=_granite),
    "llama": Architecture(_ARCH.LLAMA, permuted=True),
    "mistral": Architecture(_ARCH.LLAMA, permuted=True),
    "olmo2": Architecture(_ARCH.OLMO2),
    "phi": Architecture(_ARCH.PHI2, gelu=True),
    "phi3": Architecture(_ARCH.PHI3, windows=True, more=_phi3),
    "qwen2": Architecture(_ARCH.QWEN2),
    "qwen3": Architecture(_ARCH.QWEN3),
    "smollm3": Architecture(_ARCH.SMOLLM3, permuted=True, more=_smollm3),
}


class Layout:
    """Where and how a GGUF file holds the tensors of one model."""

    def __init__(self, model: Any) -> None:
        self.config, kind = model.config, model.config.model_type
        if kind not in ARCHITECTURES:
            raise InputError(
                f"GGUF files can be written for {', '.join(sorted(ARCHITECTURES))}, got {kind!r}; {CONVERT}"
            )
        self.architecture = ARCHITECTURES[kind]
        self.added = _rope_factors(model)
        self._names = gguf.get_tensor_name_map(self.architecture.id, self.config.num_hidden_layers)

    def name(self, tensor: str) -> str:
        """The GGUF name of a weight or a bias."""
        found = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"llama.cpp's {self.architecture.id.name.lower()} has no place for {tensor} of the base")
        return found

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A weight, a bias, or the factor B of an adapter's layer, as the file holds it."""
        if self.architecture.plus_one and name.endswith("norm.weight"):
            return tensor + 1
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        layer = name.split(".")[-2]
        if not self.architecture.permuted or layer not in heads:
            return tensor
        pairs = tensor.reshape(heads[layer], 2, tensor.shape[0] // heads[layer] // 2, -1)
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Writes the hyperparameters."""
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope, context = _rope(config), config.max_position_embeddings
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if window and not self.architecture.windows and (not kinds or "sliding_attention" in kinds):
            # Up to there attention without a window is the same.
            context = min(context, window)
        writer.add_context_length(context)
        writer.add_vocab_size(config.vocab_size)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rope["rope_theta"])
        if hasattr(config, "rms_norm_eps"):
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        else:
            writer.add_layer_norm_eps(config.layer_norm_eps)
        self.architecture.more(writer, config)


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters, of the layers that see everything where there are two kinds."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _rope_factors(model: Any) -> dict[str, Tensor]:
    """By how much each rotary wavelength is stretched, as a tensor for the file; empty if none is."""
    config, rotary = model.config, next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
    kind = _rope(config).get("rope_type", "default")
    if kind == "default":
        return {}
    if kind not in ("linear", "llama3") or config.model_type == "gemma3_text":
        raise InputError(f"rotary embeddings must be of type default, linear or llama3 to become GGUF, got {kind!r}")
    actual = rotary.inv_freq.double().cpu()
    plain = _rope(config)["rope_theta"] ** -(torch.arange(len(actual), dtype=torch.float64) / len(actual))
    return {"rope_freqs.weight": (plain / actual).float()}


def _every(period: int, config: Any) -> list[str]:
    """The kinds of the layers if each `period`-th sees everything."""
    kinds = ("sliding_attention", "full_attention")
    return [kinds[(layer + 1) % period == 0] for layer in range(config.num_hidden_layers)]


def _require(config: Any, key: str, wanted: Any, found: Any = None) -> None:
    found = getattr(config, key, found)
    if found != wanted:
        raise InputError(f"{key} of a {config.model_type} must be {wanted} to run in llama.cpp, got {found}")
