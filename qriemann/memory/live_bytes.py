"""Bytes of one training step, counted while the model's own code runs on tensors that have a shape and no content.

The model is built on the meta device from its configuration, with the real PEFT and adapter layers, and a step's forward,
backward and evaluation are run through it. Every storage that an operation makes is counted from its birth to its death. What
a meta tensor cannot run is replaced by a function that allocates what the real one does: 4-bit products (bitsandbytes
dequantizes a layer at a time), fused attention, and TRL's tiled loss where Triton computes it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

_ATTENTION = "qriemann_counted"
# TRL's width of a tile of the vocabulary, and what its functions for devices without Triton hold of a tile's size beside it
# (read off trl/kernels/chunked_logprob.py: a mask takes a quarter).
_VOCABULARY_CHUNK, _TILES_FORWARD, _TILES_BACKWARD = 32768, 3.25, 7.25
# bitsandbytes' NF4: blocks of 64 weights with an 8-bit scale, whose own scales are float32 for 256 blocks.
_BLOCK, _NESTED_BLOCK = 64, 256


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations make while it is active, and what they were at the peak.

    Attributes:
        live: bytes.
        peaks: for each window, the most bytes that lived in it, by the part of the model that made them.
        part: who makes the storages from now on.
        window: what the peak from now on is kept under.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.part = self.window = ""
        self.peaks: dict[str, Counter[str]] = {}
        self._highest: Counter[str] = Counter()
        self._parts: Counter[str] = Counter()
        # Tensors that were there before do not count; they are kept, so that their address is nobody else's.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._owner: dict[int, str] = {storage._cdata: "" for storage in self._known}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._owner:
            return
        self._owner[address] = self.part
        self._parts[self.part] += size
        self.live += size
        self._alive[address] = weakref.ref(storage, lambda _: self._forget(address, size))
        if self.live > self._highest[self.window]:
            self._highest[self.window] = self.live
            self.peaks[self.window] = self._parts.copy()

    def _forget(self, address: int, size: int) -> None:
        del self._alive[address]
        self._parts[self._owner.pop(address)] -= size
        self.live -= size

    def move(self, tensor: Tensor, part: str) -> None:
        """Books a tensor to another part."""
        address, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if self._owner.get(address):
            self._parts[self._owner[address]] -= size
            self._parts[part] += size
            self._owner[address] = part


def nf4_bytes(weights: int) -> int:
    """Bytes of a weight in bitsandbytes' NF4 with double quantization, its scales and tables included."""
    blocks = -(-weights // _BLOCK)
    tables = 4 * (16 + _NESTED_BLOCK + 1)
    return -(-weights // 2) + blocks + 4 * -(-blocks // _NESTED_BLOCK) + tables


class _DequantizedProduct(torch.autograd.Function):
    """What bitsandbytes' product with a 4-bit weight allocates: scales and the whole weight, at each use, and keeps nothing.

    For short inputs some GPUs have a kernel that does without; then this counts too much.
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


class QuantizedLinear(nn.Linear):
    """A linear layer that stands for bitsandbytes' Linear4bit; its weight is a shape."""

    def forward(self, x: Tensor) -> Tensor:
        y = _DequantizedProduct.apply(x, self.weight)
        # PEFT clones what a 4-bit layer returns.
        return (y if self.bias is None else y + self.bias).clone()


class _FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient attention keep: q, k, v, the output, one float32 a row, and the mask as floats."""

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


class _TiledLogProb(torch.autograd.Function):
    """What TRL's tiled loss allocates: a tile of logits, seven float32 a token, and the gradient in float32.

    Triton folds a tile in place; torch makes several of its size on the way.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, folded_in_place: bool) -> Tensor:
        statistics = hidden.new_empty(7, hidden.shape[0], dtype=torch.float32)
        tile = _tile(hidden, weight, 0 if folded_in_place else _TILES_FORWARD)
        del tile
        ctx.save_for_backward(hidden, weight, statistics)
        ctx.folded_in_place = folded_in_place
        return hidden.new_empty(hidden.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, _ = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        tile = _tile(hidden, weight, 0 if ctx.folded_in_place else _TILES_BACKWARD)
        del tile
        return grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None


def _tile(hidden: Tensor, weight: Tensor, copies: float) -> tuple[Tensor, Tensor]:
    """The buffer of one tile, as wide as it may get, and `copies` float32 of what is used of it."""
    rows, used = min(hidden.shape[0], TOKEN_CHUNK_SIZE), min(weight.shape[0], _VOCABULARY_CHUNK)
    buffer = hidden.new_empty(rows, _VOCABULARY_CHUNK)
    return buffer, hidden.new_empty(int(copies * rows * used), dtype=torch.float32)


def shapes_of(config: PreTrainedConfig, dtype: torch.dtype, *, quantized: bool, eager: bool = False) -> Any:
    """The causal language model of a configuration, frozen, on the meta device.

    Args:
        config: of a causal language model.
        dtype: of activations and of all that is not quantized.
        quantized: every linear layer but the output head is 4-bit.
        eager: attention as transformers' eager code has it, with its matrix of tokens by tokens.
    """
    AttentionInterface.register(_ATTENTION, _counted_attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager" if eager else _ATTENTION
        )
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
    padded: bool,
    training: bool,
    on_gpu: bool,
    grads_held: bool,
) -> dict[str, Counter[str]]:
    """Peak bytes of one batch beyond the weights, by the part of the model that made them.

    There are two peaks, because in a deeper model each grows by what one more layer adds to it: "early", when it is the
    activations that pile up, and "late", in the backward of the first layer, when it is the gradients.

    Args:
        model: a PEFT model on the meta device.
        batch, length: rows and tokens a row.
        padded: the attention needs a mask, because rows differ in length or several samples share one.
        training: forward and backward; otherwise the forward of an evaluation.
        on_gpu: the loss is folded by Triton.
        grads_held: the gradients of an earlier batch are still there, as in gradient accumulation.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counter = LiveBytes([*model.parameters(), *model.buffers(), *adapter_tensors(model)])
    base: Any = model.get_base_model()
    hooks = _watch_parts(base, counter)
    hooks += [
        parameter.register_post_accumulate_grad_hook(lambda p: counter.move(p.grad, "gradients"))
        for parameter in trainable
    ]
    counter.window = "early"
    model.train(training)
    try:
        with counter, torch.set_grad_enabled(training):
            if grads_held:
                counter.part = "gradients"
                for parameter in trainable:
                    parameter.grad = torch.empty_like(parameter)
            counter.part = "tokens and mask"
            ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
            # 4-D masks are taken as they are.
            mask = torch.empty(batch, 1, length, length, dtype=torch.bool, device="meta") if padded else None
            counter.part = "positions and the rest"
            hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            counter.part = "loss"
            flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            loss = _TiledLogProb.apply(flat, base.get_output_embeddings().weight, on_gpu).sum()
            # As the trainer does, which keeps nothing but the loss: what backward is done with is free.
            del hidden, flat
            if training:
                counter.part = "backward: gradients in flight, tiles of the loss"
                loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.grad = None
    return counter.peaks


def adapter_tensors(model: nn.Module) -> list[Tensor]:
    """What the adapters hold outside their parameters: cores and offsets."""
    found: list[Tensor] = []
    for module in model.modules():
        for variant in getattr(module, "lora_variant", {}).values():
            found += [variant.point.s, *(variant.point.offset or ())]
    return found


def _watch_parts(base: Any, counter: LiveBytes) -> list[Any]:
    """Hooks that tell the counter which part of the model computes."""
    hooks = []

    def watch(module: nn.Module, part: str) -> None:
        before: list[str] = []

        def enter(*_: Any) -> None:
            before.append(counter.part)
            counter.part = part

        def leave(*_: Any) -> None:
            counter.part = before.pop()

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))

    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            watch(module, "hidden states between layers")
            for name, child in module.named_children():
                watch(child, _part_of(name))
    watch(base.get_input_embeddings(), "hidden states between layers")
    first = next(module for module in base.modules() if isinstance(module, GradientCheckpointingLayer))
    return [*hooks, _tell_when_backward_reaches(first, counter)]


def _tell_when_backward_reaches(layer: nn.Module, counter: LiveBytes) -> Any:
    def begin(_: Tensor) -> None:
        counter.window = "late"

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # A recomputed forward is in the backward already.
        if hidden.requires_grad and counter.window == "early":
            hidden.register_hook(begin)

    return layer.register_forward_hook(watch)


def _part_of(name: str) -> str:
    if "norm" in name:
        return "norms"
    if "attn" in name or "attention" in name:
        return "attention"
    return "MLP"
