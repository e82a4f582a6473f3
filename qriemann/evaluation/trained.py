"""The trained model: the adapter on its base, loaded as in training, computed by PEFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qriemann.adapters.attach import load_base
from qriemann.adapters.saved import SavedAdapter, saved_tokenizer
from qriemann.base.load import compute_in
from qriemann.base.tensors import Tensors
from qriemann.checkpoints.fingerprints import other_base
from qriemann.device import compute_device, compute_dtype, describe_device
from qriemann.errors import InputError
from qriemann.evaluation.rows import Rows, load_rows
from qriemann.folder.contents import read_folder
from qriemann.folder.records import recorded_base
from qriemann.upstream import was_conv1d

_MAX_LENGTH, _MAX_TOKENS = 1024, 2048
_RECORDED_BYTES = 2**29


def dequantized_weights(model: PreTrainedModel) -> Tensors:
    """The float weights that a model computes with, 4-bit ones dequantized one at a time.

    Take them before PEFT renames the model's modules.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            # No checkpoint has the others.
            if name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}".lstrip(".")] = buffer
    # 4-bit layers have the layout of nn.Linear whatever they were quantized from.
    turned = {f"{name}.weight" for name, module in model.named_modules() if was_conv1d(module)}
    dtype = model.dtype

    def read(name: str) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        tensor = tensors[name]
        state = getattr(tensor, "quant_state", None)
        if state is None:
            return tensor.detach()
        weight = dequantize_4bit(tensor.data, state).to(dtype)
        return weight.mT.contiguous() if name in turned else weight

    return Tensors(tensors, read)


@dataclass(frozen=True)
class Trained:
    """The base with its adapter, and what was taken from the base before PEFT wrapped it.

    Attributes:
        tied: the names of the output head's tensor and of the embeddings' that the base ties it to; None if it does not.
        untied: whether training has given the two different values.
    """

    base: str
    revision: str | None
    model: PreTrainedModel
    peft: PeftModel
    tokenizer: PreTrainedTokenizerBase
    adapter: SavedAdapter
    dequantized: Tensors
    lora_layers: dict[str, Any]
    untrained_biases: dict[str, Tensor]
    quantized: bool
    tied: tuple[str, str] | None
    untied: bool
    notes: list[str]

    @property
    def trained_on(self) -> str:
        """What `merge` calls the base that was trained on."""
        return "nf4-dequantized" if self.quantized else "original"

    def is_conv1d(self, module: str) -> bool:
        """Whether a checkpoint has the layer's weight transposed."""
        layer = self.lora_layers[module].get_base_layer()
        return isinstance(layer, Conv1D) or was_conv1d(layer)

    def added(self, module: str) -> Tensor:
        """What PEFT adds to a layer's weight, in float32, in the layout of a checkpoint."""
        layer = self.lora_layers[module]
        change = layer.get_delta_weight("default").float()
        return change.mT if was_conv1d(layer.get_base_layer()) else change

    def check_mergeable(self) -> None:
        """Raises InputError if the adapter changes what the base has no tensor for."""
        for name, layer in self.adapter.layers.items():
            if layer.bias is not None and f"{name}.bias" not in self.dequantized:
                raise InputError(f"lora_bias must be of layers with a bias to be merged, got {name} without one")

    def as_trained(self, name: str, stored: Tensor, *, by_peft: bool = False) -> Tensor:
        """A tensor of a checkpoint with what training changed, float32 where a layer's adapter is in it."""
        module, _, kind = name.rpartition(".")
        tensor, layer = self.adapter.replacement(name, stored), self.adapter.layers.get(module)
        if layer is None:
            return tensor
        if kind == "bias":
            return tensor if layer.bias is None else tensor.float() + layer.scaling * layer.bias.to(tensor.device)
        if by_peft:
            return tensor.float() + self.added(module).to(tensor.device)
        left, right = (layer.a.mT, layer.b.mT) if self.is_conv1d(module) else (layer.b, layer.a)
        return torch.addmm(tensor.float(), left.to(tensor.device), right.to(tensor.device), alpha=layer.scaling)

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

    def proof_rows(self, data: str | None, console: Console, max_tokens: int | None = None) -> Rows:
        """The rows of a proof: few enough that their logits fit into half a gigabyte, whatever the vocabulary."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        budget = min(max_tokens or _MAX_TOKENS, _RECORDED_BYTES // (4 * vocabulary))
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
    quantize: str | None = None,
    dtype: torch.dtype | str | None = "float32",
    device: str | None = None,
) -> Trained:
    """The base as it was in training, with the adapter, in eval mode.

    Without a record of the training beside the adapter, the base is loaded in 4 bit.

    Args:
        quantize: "nf4" or "none", instead of what was trained on.
        dtype: to compute in; None is that of training. A proof computes in float32, so that what it finds is not the
            computation's rounding.

    Raises:
        InputError: the base cannot be had, or the adapter does not fit it.
    """
    recorded = recorded_base(saved.folder)
    name = saved.base(base or read_folder(saved.folder).base)
    revision = revision or (saved.config.revision if base is None else None)
    stored = recorded.get("quant_type") or "nf4" if recorded.get("quantized", True) else "none"
    chosen = quantize or stored
    # 4-bit codes depend on the dtype that they are quantized from; unquantized weights can be loaded in any.
    loaded_in = dtype if dtype and chosen == "none" else recorded.get("dtype") or dtype
    place = compute_device(device)
    where = describe_device(place, compute_dtype(place, dtype or recorded.get("dtype")))
    console.print(f"Loading {name} {_how(chosen)} on {where} ...", highlight=False, soft_wrap=True)
    model, tokenizer = load_base(
        name,
        quantize=None if chosen == "none" else chosen,  # type: ignore[arg-type]
        double_quant=recorded.get("double_quant") is not False,
        dtype=loaded_in,
        device=place,
        revision=revision,
    )
    if dtype is None and recorded.get("device", model.device.type) != model.device.type:
        dtype = compute_dtype(model.device)
    other = other_base(recorded, model, name)
    if dtype is not None and dtype != loaded_in:
        compute_in(model, dtype)
    notes = [] if other is None else [f"warning: {other}"]
    if recorded and chosen != stored:
        notes.append(f"warning: the adapter was trained on the base {_how(stored)}, and is read on it {_how(chosen)}")
    if grown := saved.grow_vocabulary(model):
        notes.append(f"note: {grown}")
    tokenizer = _tokenizer(saved, model, tokenizer, notes)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    dequantized = dequantized_weights(model)
    biases = [name for name in saved.replaced if name.endswith(".bias") and name in dequantized]
    untrained = {name: dequantized[name].clone() for name in biases}
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    ends = model.get_output_embeddings(), model.get_input_embeddings()
    ties = ends[0] is not None and ends[0].weight is ends[1].weight
    tied = (names[id(ends[0])], names[id(ends[1])]) if ties else None
    peft = saved.put_on(model, name)
    return Trained(
        base=name,
        revision=revision,
        model=model,
        peft=peft,
        tokenizer=tokenizer,
        adapter=saved,
        dequantized=dequantized,
        lora_layers={layer: peft.get_submodule(f"base_model.model.{layer}") for layer in saved.layers},
        untrained_biases=untrained,
        quantized=bool(getattr(model, "is_loaded_in_4bit", False)),
        tied=tied,
        untied=ties and not _same_weights(model.get_output_embeddings(), model.get_input_embeddings()),
        notes=notes,
    )


def _how(quantize: str) -> str:
    return "unquantized" if quantize == "none" else "in 4 bit"


def _tokenizer(
    saved: SavedAdapter, model: PreTrainedModel, of_base: PreTrainedTokenizerBase, notes: list[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, or the base's; adds a note where it has tokens that the model lacks."""
    tokenizer = saved_tokenizer(saved.folder) or of_base
    if tokenizer.pad_token is None:
        tokenizer.pad_token = of_base.pad_token
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        notes.append(
            f"warning: the tokenizer in {saved.folder} has {len(tokenizer) - rows} tokens more than the base, and no "
            "embeddings of them were saved; save the adapter again with save_embedding_layers=True"
        )
    return tokenizer


def _same_weights(*modules: Any) -> bool:
    """Whether two modules compute with equal weights, what PEFT adds to them or puts in their place included."""

    def weight(module: Any) -> Tensor:
        return module.weight + module.get_delta_weight("default") if isinstance(module, LoraLayer) else module.weight

    first, second = (weight(module).detach() for module in modules)
    return first.shape == second.shape and bool(torch.equal(first, second))
