"""GGUF files of a model and of an adapter, written tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qriemann.adapters.saved import SavedAdapter
from qriemann.errors import InputError
from qriemann.evaluation.trained import Trained
from qriemann.gguf.architectures import Layout
from qriemann.gguf.vocabulary import write_vocabulary

_TYPE = gguf.GGMLQuantizationType
# Those that the package gguf writes itself, with llama.cpp's number for a file of the type.
TYPES = {
    "f32": (_TYPE.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (_TYPE.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (_TYPE.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (_TYPE.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (_TYPE.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (_TYPE.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (_TYPE.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (_TYPE.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Embeddings and head are never below this: as in llama.cpp's own quantization, they lose most by it.
_OUTER = ("token_embd.weight", "output.weight")


def write_model(
    path: Path,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, Any],
    tensor_of: Callable[[str], Tensor],
    type_name: str,
    *,
    name: str,
) -> None:
    """Writes a whole model; one tensor at a time is in memory.

    Args:
        path: of the new file.
        layout: of the model.
        tensors: by their names in transformers, for their shapes.
        tensor_of: the tensor of such a name.
        type_name: a key of `TYPES`. Norms and biases stay in float32, embeddings and head in q8_0 at least, and rows that do
            not divide into blocks in float16.
        name: of the model, for people.

    Raises:
        InputError: llama.cpp has no such model.
    """
    wanted, file_type = TYPES[type_name]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[layout.architecture.id])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        layout.describe(writer)
        embeddings = next(tensor for key, tensor in tensors.items() if layout.name(key) == "token_embd.weight")
        write_vocabulary(writer, tokenizer, embeddings.shape[0])
        types = {key: _type_of(layout.name(key), tensor.shape, wanted) for key, tensor in tensors.items()}
        for key, tensor in tensors.items():
            _announce(writer, layout.name(key), tensor.shape, types[key])
        for key, tensor in layout.added.items():
            _announce(writer, key, tensor.shape, _TYPE.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, kind in types.items():
            stored = layout.as_stored(key, tensor_of(key).float()).cpu().contiguous().numpy()
            writer.write_tensor_data(gguf.quantize(stored, kind))
        for tensor in layout.added.values():
            writer.write_tensor_data(tensor.numpy())
    finally:
        writer.close()


def size_of(layout: Layout, tensors: Mapping[str, Any], type_name: str) -> int:
    """Bytes of the tensors of such a file."""
    return sum(
        _bytes(tensor.shape, _type_of(layout.name(key), tensor.shape, TYPES[type_name][0]))
        for key, tensor in tensors.items()
    )


def _type_of(name: str, shape: Sequence[int], wanted: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if len(shape) < 2 or wanted is _TYPE.F32:
        return _TYPE.F32
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    if name in _OUTER and size < block:
        wanted = _TYPE.Q8_0
    return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else _TYPE.F16


def _bytes(shape: Sequence[int], kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _announce(writer: gguf.GGUFWriter, name: str, shape: Sequence[int], kind: gguf.GGMLQuantizationType) -> None:
    # The dtype decides nothing where the type is named.
    writer.add_tensor_info(name, tuple(shape), np.dtype(np.float32), _bytes(shape, kind), raw_dtype=kind)


def check_adapter(adapter: SavedAdapter, model: Any, *, merged: bool) -> None:
    """Raises InputError if llama.cpp cannot take what was trained.

    Args:
        merged: it goes into the model's weights, so that whole tensors may have been trained as well.
    """
    if adapter.replaced and not merged:
        raise InputError(
            f"a GGUF adapter holds low-rank factors alone, got {next(iter(adapter.replaced))}, trained whole; export the "
            "merged model, --to gguf"
        )
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight and any(
        model.get_submodule(key) is head for key in adapter.layers
    ):
        raise InputError(
            "the head is the embeddings in this base, and llama.cpp cannot adapt one alone; train without it"
        )


def write_adapter(path: Path, layout: Layout, adapter: SavedAdapter, *, name: str) -> None:
    """Writes the adapter for llama.cpp's `--lora`, in float32.

    llama.cpp multiplies by alpha / r. Another scaling of a layer (rslora, `alpha_pattern`) goes into its B.
    """
    alpha = float(adapter.config.lora_alpha)
    # Zero would mean a scaling of one.
    alpha = alpha if alpha > 0 else 1.0
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[layout.architecture.id])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for module, layer in adapter.layers.items():
            target = layout.name(f"{module}.weight")
            folded = layer.scaling * layer.b.shape[1] / alpha
            b = layout.as_stored(f"{module}.weight", layer.b if abs(folded - 1) < 1e-9 else layer.b * folded)
            writer.add_tensor(f"{target}.lora_a", layer.a.contiguous().numpy())
            writer.add_tensor(f"{target}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def merged_tensor(trained: Trained, name: str) -> Tensor:
    """A tensor of the trained model with the adapter in it, in float32."""
    tensor = trained.adapter.replaced.get(name, trained.dequantized[name]).float()
    layer = trained.adapter.layers.get(name.removesuffix(".weight"))
    if layer is None or not name.endswith(".weight"):
        return tensor
    return torch.addmm(tensor, layer.b.to(tensor.device), layer.a.to(tensor.device), alpha=layer.scaling)


def read_back(path: Path) -> Callable[[str], Tensor | None]:
    """What a file holds under a GGUF name: the tensor, or of an adapter what it adds to it; None if it is not there."""
    reader = gguf.GGUFReader(path)
    held = {tensor.name: tensor for tensor in reader.tensors}
    alpha = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)

    def array(name: str) -> Tensor | None:
        if name not in held:
            return None
        return torch.from_numpy(gguf.dequantize(held[name].data, held[name].tensor_type).copy())

    def read(name: str) -> Tensor | None:
        if alpha is None:
            return array(name)
        a, b = array(f"{name}.lora_a"), array(f"{name}.lora_b")
        return None if a is None or b is None else float(alpha.contents()) / len(a) * (b @ a)

    return read
