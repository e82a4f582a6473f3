"""Counts the bytes of a training step by running the model's own code on the meta device, on tensors without content.

The PEFT and adapter layers are the real ones. What cannot run on a meta tensor is replaced by a function that allocates what
the real one does: products with 4-bit weights, fused attention, and TRL's tiled loss.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from qriemann.memory.live_bytes import LiveBytes, held_tensors

# The name under which transformers knows the functions that only count.
_COUNTED = "qriemann_counted"
# The width of TRL's tile of the vocabulary, and the float32 copies of a tile that its functions for devices without Triton
# hold beside it (trl/kernels/chunked_logprob.py; a mask takes a quarter).
_VOCABULARY_CHUNK, _TILES_FORWARD, _TILES_BACKWARD = 32768, 3.25, 7.25
# bitsandbytes' NF4: blocks of 64 weights with an 8-bit scale, whose own scales are float32 for 256 blocks.
_BLOCK, _NESTED_BLOCK = 64, 256


def nf4_bytes(weights: int) -> int:
    """Bytes of a weight in bitsandbytes' NF4 with double quantization, its scales and tables included."""
    blocks = -(-weights // _BLOCK)
    tables = 4 * (16 + _NESTED_BLOCK + 1)
    return -(-weights // 2) + blocks + 4 * -(-blocks // _NESTED_BLOCK) + tables


class QuantizedLinear(nn.Linear):
    """Stands for bitsandbytes' Linear4bit; its weight is a shape.

    Attributes:
        dequantized: whether the dequantized weight is held, so that its uses allocate nothing.
    """

    dequantized = False

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.mT if self.dequantized else _DequantizedProduct.apply(x, self.weight)
        # PEFT clones what a 4-bit layer returns.
        return (y if self.bias is None else y + self.bias).clone()


class _DequantizedProduct(torch.autograd.Function):
    """bitsandbytes' product with a 4-bit weight: each use allocates its scales and the whole weight, and keeps nothing.

    Some GPUs have a kernel for short inputs that needs less.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x @ _dequantized(weight).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ _dequantized(ctx.weight), None


def _dequantized(weight: Tensor) -> Tensor:
    scales = weight.new_empty(weight.numel() // _BLOCK, dtype=torch.float32)
    full = torch.empty_like(weight)
    del scales
    return full


class _FusedAttention(torch.autograd.Function):
    """Flash and memory-efficient attention keep q, k, v, the output, one float32 a row, and the mask as floats."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        rows = q.new_empty(batch, heads, length, dtype=torch.float32)
        bias = None if mask is None else q.new_empty(mask.shape)
        ctx.save_for_backward(q, k, v, out, rows, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, _, rows, _ = ctx.saved_tensors
        # Rows of (grad * out).sum(-1), and q's gradient accumulated over blocks of keys.
        scratch = torch.empty_like(rows), torch.empty_like(q, dtype=torch.float32)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del scratch
        return *grads, None


def _counted_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    groups = getattr(module, "num_key_value_groups", 1)
    # As transformers' sdpa does: with a mask, the fused kernels take no grouped heads.
    if attention_mask is not None and groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return _FusedAttention.apply(query, key, value, attention_mask).transpose(1, 2).contiguous(), None


def _counted_experts(module: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Every token goes through as many experts as are chosen for it, and one stands for all."""
    each = chosen.shape[-1]
    # By the expert, which a tensor without content does not know.
    order = torch.empty(chosen.numel(), dtype=torch.int64, device=hidden.device)
    inner = _expert_product(module, hidden[order], module.gate_up_proj if module.has_gate else module.up_proj)
    if module.has_gate:
        gate, up = inner.chunk(2, dim=-1)
        inner = module.act_fn(gate) * up
    weighted = _expert_product(module, inner, module.down_proj) * shares.reshape(-1, 1)
    return weighted[order].view(len(hidden), each, -1).sum(1).to(hidden.dtype)


def _expert_product(module: Any, x: Tensor, weights: Tensor) -> Tensor:
    return x.to(weights.dtype) @ (weights[0] if module.is_transposed else weights[0].mT)


class _TiledLogProb(torch.autograd.Function):
    """TRL's tiled loss allocates a tile of logits, seven float32 a token, and the gradient in float32.

    Triton folds a tile in place; torch makes several copies of it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, folded_in_place: bool) -> Tensor:
        statistics = hidden.new_empty(7, hidden.shape[0], dtype=torch.float32)
        _allocate_tile(hidden, weight, 0 if folded_in_place else _TILES_FORWARD)
        ctx.save_for_backward(hidden, weight, statistics)
        ctx.folded_in_place = folded_in_place
        return hidden.new_empty(hidden.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, _ = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _allocate_tile(hidden, weight, 0 if ctx.folded_in_place else _TILES_BACKWARD)
        return grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None


def _allocate_tile(hidden: Tensor, weight: Tensor, copies: float) -> None:
    """Allocates and frees the buffer of one tile at its full width, and `copies` of the part that is used, in float32."""
    rows, used = min(hidden.shape[0], TOKEN_CHUNK_SIZE), min(weight.shape[0], _VOCABULARY_CHUNK)
    buffers = (
        hidden.new_empty(rows, _VOCABULARY_CHUNK),
        hidden.new_empty(int(copies * rows * used), dtype=torch.float32),
    )
    del buffers


def meta_model(config: PreTrainedConfig, dtype: torch.dtype, *, quantized: bool, eager: bool) -> Any:
    """The frozen causal language model of a configuration on the meta device.

    Args:
        config: of a causal language model.
        dtype: of activations and of everything that is not quantized.
        quantized: every linear layer but the output head is 4-bit.
        eager: use transformers' eager attention, with its matrix of tokens by tokens.
    """
    AttentionInterface.register(_COUNTED, _counted_attention)
    ALL_EXPERTS_FUNCTIONS.register(_COUNTED, _counted_experts)
    options = {"attn_implementation": "eager" if eager else _COUNTED, "experts_implementation": _COUNTED}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    if quantized:
        head = model.get_output_embeddings()
        for module in model.modules():
            if type(module) is nn.Linear and module is not head:
                module.__class__ = QuantizedLinear
    return model.requires_grad_(False)


def count_step(
    model: PeftModel,
    *,
    batch: int,
    length: int,
    masked: bool,
    training: bool,
    on_gpu: bool,
    grads_held: bool,
) -> dict[str, Counter[str]]:
    """Peak bytes of one batch beyond the weights, by the part of the model that allocates them, in two windows.

    Two peaks, because they scale differently with depth: "early" (until backward reaches the first layer: activations) and
    "late" (after: gradients).

    Args:
        model: a PEFT model on the meta device.
        batch, length: rows, and tokens of each.
        masked: the attention needs a mask, because rows differ in length or several samples share one.
        training: forward and backward; otherwise the forward of an evaluation.
        on_gpu: the loss runs in Triton.
        grads_held: the gradients of an earlier batch are still there, as in gradient accumulation.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counter = LiveBytes(held_tensors(model))
    counter.window = "early"
    base: Any = model.get_base_model()
    model.train(training)
    try:
        with _watched(base, counter), counter, torch.set_grad_enabled(training):
            if grads_held:
                counter.part = "gradients"
                for parameter in trainable:
                    parameter.grad = torch.empty_like(parameter)
            counter.part = "tokens and mask"
            ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
            # transformers takes a 4-D mask as it is.
            mask = torch.empty(batch, 1, length, length, dtype=torch.bool, device="meta") if masked else None
            counter.part = "positions and the rest"
            hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            counter.part = "loss"
            flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            loss = _TiledLogProb.apply(flat, base.get_output_embeddings().weight, on_gpu).sum()
            # The trainer keeps nothing but the loss, so backward frees what it has used.
            del hidden, flat
            if training:
                counter.part = "backward: gradients, tiles of the loss"
                loss.backward()
    finally:
        for parameter in trainable:
            parameter.grad = None
    return counter.peaks


def _watched(base: Any, counter: LiveBytes) -> ExitStack:
    """Tells the counter, until it is closed, which part of the model computes and when backward reaches the first layer."""
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = dict.fromkeys([*layers, base.get_input_embeddings()], "hidden states between layers")
    for layer in layers:
        parts |= {child: _part_of(name) for name, child in layer.named_children()}
    before: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        before.append(counter.part)
        counter.part = parts.get(module, counter.part)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        counter.part = before.pop()
        # With checkpointing, the layer's second forward is a part of the backward.
        if module is layers[0] and counter.window == "early":
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(reach)

    def reach(_: Tensor) -> None:
        counter.window = "late"

    hooks = ExitStack()
    hooks.callback(register_module_forward_pre_hook(enter).remove)
    hooks.callback(register_module_forward_hook(leave, always_call=True).remove)
    return hooks


def _part_of(name: str) -> str:
    if "norm" in name:
        return "norms"
    return "attention" if "attn" in name or "attention" in name else "MLP"
