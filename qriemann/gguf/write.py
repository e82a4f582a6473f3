"""GGUF files of a model and of an adapter, written tensor by tensor."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qriemann.adapters.saved import SavedAdapter
from qriemann.device import free_bytes
from qriemann.errors import InputError
from qriemann.evaluation.trained import Trained
from qriemann.gguf.architectures import Layout
from qriemann.gguf.vocabulary import write_vocabulary

_TYPE = gguf.GGMLQuantizationType
# Those that the package gguf writes itself, with llama.cpp's number for a file of the type.
TYPES = {
    name: (_TYPE[name.upper()], gguf.LlamaFileType[f"{'ALL' if name == 'f32' else 'MOSTLY'}_{name.upper()}"])
    for name in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
}


def write_model(
    path: Path,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    shapes: Mapping[str, Sequence[int]],
    tensor_of: Callable[[str], Tensor],
    type_name: str,
    *,
    name: str,
) -> None:
    """Writes a whole model; one tensor at a time is in memory.

    Args:
        type_name: a key of `TYPES`. Norms and biases stay in float32, embeddings and head in q8_0 at least, and rows that do
            not divide into blocks in float16.
    """
    with _writing(path, layout, gguf.GGUFType.MODEL, TYPES[type_name][1], name) as writer:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        layout.describe(writer)
        embeddings = next(shape for key, shape in shapes.items() if layout.name(key) == "token_embd.weight")
        write_vocabulary(writer, tokenizer, embeddings[0])
        kinds = {key: _kind(layout.name(key), shape, type_name) for key, shape in shapes.items()}
        announced = {layout.name(key): (shape, kinds[key]) for key, shape in shapes.items()}
        announced |= {key: (tensor.shape, _TYPE.F32) for key, tensor in layout.added.items()}
        for key, (shape, kind) in announced.items():
            # The dtype decides nothing where the type is named.
            writer.add_tensor_info(key, tuple(shape), np.dtype(np.float32), _bytes(shape, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, kind in kinds.items():
            stored = layout.as_stored(key, tensor_of(key).float()).cpu().contiguous().numpy()
            writer.write_tensor_data(gguf.quantize(stored, kind))
        for tensor in layout.added.values():
            writer.write_tensor_data(tensor.numpy())


def write_adapter(path: Path, layout: Layout, adapter: SavedAdapter, *, name: str) -> None:
    """Writes the adapter for llama.cpp's `--lora`, in float32.

    llama.cpp multiplies by alpha / r, or by 1 if alpha is 0. Here alpha is 1, and a layer's whole scaling is in its B.
    """
    with _writing(path, layout, gguf.GGUFType.ADAPTER, gguf.LlamaFileType.ALL_F32, name) as writer:
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
        for module, layer in adapter.layers.items():
            target = layout.name(f"{module}.weight")
            b = layout.as_stored(f"{module}.weight", layer.b * (layer.scaling * layer.b.shape[1]))
            writer.add_tensor(f"{target}.lora_a", layer.a.contiguous().numpy())
            writer.add_tensor(f"{target}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


@contextmanager
def _writing(path: Path, layout: Layout, what: str, file_type: int, name: str) -> Iterator[gguf.GGUFWriter]:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[layout.architecture.id])
    try:
        writer.add_type(what)
        writer.add_name(name)
        writer.add_file_type(file_type)
        yield writer
    finally:
        writer.close()


def size_of(layout: Layout, shapes: Mapping[str, Sequence[int]], type_name: str) -> int:
    """Bytes of the tensors of such a file."""
    return sum(_bytes(shape, _kind(layout.name(key), shape, type_name)) for key, shape in shapes.items())


def _kind(name: str, shape: Sequence[int], type_name: str) -> gguf.GGMLQuantizationType:
    """As what a tensor is stored in a file of the type."""
    wanted = TYPES[type_name][0]
    if len(shape) < 2:
        return _TYPE.F32
    # As in llama.cpp's own quantization, they lose most by it.
    if name in ("token_embd.weight", "output.weight") and type_name[0] == "q":
        wanted = _TYPE.Q8_0
    return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else _TYPE.F16


def _bytes(shape: Sequence[int], kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


@dataclass(frozen=True)
class Files:
    """What was written.

    Attributes:
        exact: the model or the base in `exact_type`: f32, or f16 where that does not fit into memory. For the proof alone.
    """

    exact: Path
    exact_type: str
    adapter: Path | None
    ladder: dict[str, Path]


def write_files(
    trained: Trained,
    layout: Layout,
    folder: Path,
    scratch: Path,
    name: str,
    types: Sequence[str] | None,
    console: Console,
) -> Files:
    """Writes the files of one export."""
    if types is None:
        _check_adapter(trained)
    trained.check_mergeable()
    tensors, merged = trained.dequantized, types is not None
    # A head that training has given values of its own.
    twin = dict([trained.tied]) if merged and trained.untied and trained.tied else {}
    shapes = {key: tensors[twin.get(key, key)].shape for key in [*tensors, *twin]}
    exact_type = "f32" if size_of(layout, shapes, "f32") < free_bytes(torch.device("cpu")) else "f16"
    places = {exact_type: scratch, **dict.fromkeys(types or (), folder)}
    needed, free = sum(size_of(layout, shapes, kind) for kind in places), shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder.parent} has {decimal(free)} free, and the files need {decimal(needed)}")

    def tensor_of(key: str) -> Tensor:
        stored = tensors[twin.get(key, key)]
        return trained.as_trained(key, stored) if merged else stored

    paths = {kind: place / f"{name}-{kind.upper()}.gguf" for kind, place in places.items()}
    for kind, path in paths.items():
        console.print(f"Writing {kind}{' for the proof' if places[kind] == scratch else ''} ...", highlight=False)
        write_model(path, layout, trained.tokenizer, shapes, tensor_of, kind, name=name)
    file = None
    if not merged:
        file = folder / f"{name}-LoRA-F32.gguf"
        write_adapter(file, layout, trained.adapter, name=name)
    return Files(paths[exact_type], exact_type, file, {kind: paths[kind] for kind in types or ()})


def _check_adapter(trained: Trained) -> None:
    """Refuses an adapter that llama.cpp cannot apply to the base."""
    adapter = trained.adapter
    more = [f"{name}.bias" for name, layer in adapter.layers.items() if layer.bias is not None]
    if more := [*adapter.replaced, *adapter.rows, *more]:
        raise InputError(f"a GGUF adapter holds low-rank factors alone, got {more[0]}; use --to gguf")
    if trained.tied and trained.tied[0].removesuffix(".weight") in adapter.layers:
        raise InputError("the head is the embeddings in this base, and llama.cpp cannot adapt one alone; use --to gguf")
