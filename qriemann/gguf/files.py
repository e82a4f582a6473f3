"""The GGUF files of one export: what was asked for, and what only the proof needs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.filesize import decimal
from torch import Tensor

from qriemann.data.chat_mask import end_of_turn
from qriemann.errors import InputError
from qriemann.evaluation import proof
from qriemann.evaluation.trained import Trained
from qriemann.gguf import write
from qriemann.gguf.architectures import Layout


@dataclass(frozen=True)
class Files:
    """What was written.

    Attributes:
        exact: the file that rounds nothing, the model or the base; only the proof needs it.
        exact_type: f32, or f16 where that does not fit into memory.
        adapter: the adapter to it; None if the model is merged.
        ladder: the merged files by type.
        worst: the largest relative difference of a tensor read back from what PEFT computes, and that tensor's name.
        stops: the tokens that end a turn.
    """

    exact: Path
    exact_type: str
    adapter: Path | None
    ladder: dict[str, Path]
    worst: tuple[float, str]
    stops: list[str]


def write_files(
    trained: Trained,
    layout: Layout,
    folder: Path,
    scratch: Path,
    name: str,
    types: Sequence[str] | None,
    console: Console,
) -> Files:
    """Writes the files, and reads back the one that rounds nothing.

    Args:
        layout: of the trained model.
        folder: for what was asked for.
        scratch: for what only the proof needs.
        name: the files' names begin with it.
        types: of the merged files; None for the adapter alone.

    Raises:
        InputError: llama.cpp has no such model or adapter, or the disk is too small.
    """
    write.check_adapter(trained.adapter, trained.model, merged=types is not None)
    tensors, layers = trained.dequantized, trained.adapter.layers
    exact_type = "f32" if write.size_of(layout, tensors, "f32") < psutil.virtual_memory().available else "f16"
    places = {exact_type: scratch, **dict.fromkeys(types or (), folder)}
    needed, free = sum(write.size_of(layout, tensors, kind) for kind in places), shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder.parent} has {decimal(free)} free, and the files need {decimal(needed)}; name another output"
        )

    def tensor_of(key: str) -> Tensor:
        return tensors[key] if types is None else write.merged_tensor(trained, key)

    paths = {kind: place / f"{name}-{kind.upper()}.gguf" for kind, place in places.items()}
    for kind, path in paths.items():
        console.print(f"Writing {kind}{' for the proof' if places[kind] == scratch else ''} ...", highlight=False)
        write.write_model(path, layout, trained.tokenizer, tensors, tensor_of, kind, name=name)
    adapter = None
    if types is None:
        adapter = folder / f"{name}-LoRA-F32.gguf"
        write.write_adapter(adapter, layout, trained.adapter, name=name)

    def expected(key: str) -> Tensor:
        module = key.removesuffix(".weight")
        # As PEFT computes it.
        added = trained.added(module).cpu() if key.endswith(".weight") and module in layers else 0.0
        if adapter is not None:
            return layout.as_stored(key, added)  # type: ignore[arg-type]
        stored = layout.as_stored(key, trained.adapter.replaced.get(key, tensors[key]).float().cpu() + added)
        return stored if exact_type == "f32" or stored.ndim < 2 else stored.half()

    read = write.read_back(adapter or paths[exact_type])
    names = dict.fromkeys(f"{module}.weight" for module in layers) if adapter is not None else tensors
    worst = proof.worst_weight(expected, names, lambda key: read(layout.name(key)))
    ladder = {kind: paths[kind] for kind in types or ()}
    return Files(paths[exact_type], exact_type, adapter, ladder, worst, _stops(trained))


def _stops(trained: Trained) -> list[str]:
    """The tokens that end a turn: the tokenizer's, the template's, and those of the generation settings."""
    tokenizer, generation = trained.tokenizer, trained.model.generation_config
    more = getattr(generation, "eos_token_id", None) or []
    ends = [tokenizer.eos_token_id, end_of_turn(tokenizer), *(more if isinstance(more, list) else [more])]
    return list(dict.fromkeys(tokenizer.convert_ids_to_tokens(end) for end in ends if end is not None))
