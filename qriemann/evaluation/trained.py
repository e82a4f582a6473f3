"""The trained model: the 4-bit base with the adapter, as PEFT computes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qriemann.adapters.saved import SavedAdapter, saved_tokenizer
from qriemann.base.load import load_base
from qriemann.checkpoints.fingerprints import other_base
from qriemann.device import compute_device, compute_dtype, describe_device
from qriemann.evaluation.rows import Rows, load_rows

_MAX_LENGTH, _MAX_TOKENS = 1024, 2048
_RECORDED_BYTES = 2**29


class Dequantized(Mapping[str, Tensor]):
    """The float weights that a model computes with, 4-bit ones dequantized one at a time.

    Take it before PEFT renames the model's modules.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = {
            f"{prefix}.{name}".lstrip("."): buffer
            for prefix, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            # No checkpoint has the others.
            if name not in module._non_persistent_buffers_set
        }
        self._tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **buffers}

    def __getitem__(self, name: str) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        tensor = self._tensors[name]
        state = getattr(tensor, "quant_state", None)
        return tensor.detach() if state is None else dequantize_4bit(tensor.data, state)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Trained:
    """The 4-bit base with its adapter, and what was taken from the base before PEFT wrapped it."""

    base: str
    revision: str | None
    model: PreTrainedModel
    peft: PeftModel
    tokenizer: PreTrainedTokenizerBase
    adapter: SavedAdapter
    dequantized: Dequantized
    lora_layers: dict[str, Any]
    untrained_biases: dict[str, Tensor]

    def added(self, module: str) -> Tensor:
        """What PEFT adds to a layer's weight, in float32."""
        return self.lora_layers[module].get_delta_weight("default").float()

    @contextmanager
    def untrained(self) -> Iterator[PeftModel]:
        """Within the block, the model without what was trained; PEFT's own switch leaves trained biases in place."""
        biases = {name: self.dequantized[name] for name in self.untrained_biases}
        trained = {name: bias.clone() for name, bias in biases.items()}
        try:
            for name, bias in biases.items():
                bias.copy_(self.untrained_biases[name])
            with self.peft.disable_adapter():
                yield self.peft
        finally:
            for name, bias in biases.items():
                bias.copy_(trained[name])

    def proof_rows(self, data: str | None, console: Console) -> Rows:
        """The rows of a proof: few enough that their logits fit into half a gigabyte, whatever the vocabulary."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        budget = min(_MAX_TOKENS, _RECORDED_BYTES // (4 * vocabulary))
        rows = load_rows(data, self.tokenizer, max_length=_MAX_LENGTH, max_tokens=budget)
        for notice in rows.notices:
            console.print(f"note: {notice}", highlight=False)
        return rows


def load_trained(
    saved: SavedAdapter,
    base: str | None,
    revision: str | None,
    console: Console,
    *,
    dtype: str | None = "float32",
    device: str | None = None,
) -> Trained:
    """The 4-bit base with the adapter, in eval mode.

    Args:
        base, revision: instead of those that the adapter names.
        dtype, device: as `load_base` takes them. A proof computes in float32, so that what
            it finds is not the computation's rounding.

    Raises:
        InputError: the base cannot be had, or the adapter does not fit it.
    """
    name = saved.base(base)
    revision = revision or (saved.config.revision if base is None else None)
    place = compute_device(device)
    where = describe_device(place, compute_dtype(place, dtype))
    console.print(f"Loading {name} in 4 bit on {where} ...", highlight=False, soft_wrap=True)
    model, tokenizer = load_base(name, dtype=dtype, revision=revision, device=place)
    saved.check_fits(model, name)
    other = other_base(saved.folder, model, name)
    if other is not None:
        console.print(f"warning: {other}", highlight=False, soft_wrap=True)
    tokenizer = saved_tokenizer(saved.folder) or tokenizer
    dequantized = Dequantized(model)
    untrained = {name: dequantized[name].clone() for name in saved.replaced if name.endswith(".bias")}
    peft = saved.put_on(model, name)
    lora_layers = {layer: peft.get_submodule(f"base_model.model.{layer}") for layer in saved.layers}
    return Trained(name, revision, model, peft, tokenizer, saved, dequantized, lora_layers, untrained)
