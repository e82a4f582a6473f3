"""`merge`: a LoRA adapter into the weights of its base, tensor by tensor, and the proof that it came out right."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate.utils.memory import clear_device_cache
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig

from qriemann.adapters.saved import read_adapter
from qriemann.errors import InputError
from qriemann.evaluation import proof
from qriemann.evaluation.proof import Written
from qriemann.evaluation.trained import Trained
from qriemann.folder.contents import PROOF, read_folder
from qriemann.folder.files import check_output
from qriemann.folder.records import write_json
from qriemann.release.atomic_folder import Released, move_into_place, written_or_nothing
from qriemann.release.card import write_card
from qriemann.release.weights import (
    Checkpoint,
    original_weights,
    quantized_like,
    stored_4bit,
    tensor_names,
    write_checkpoint,
)
from qriemann.upstream import quiet

Into = Literal["nf4-dequantized", "original", "nf4"]
_DTYPES = ("float32", "bfloat16", "float16")

# Mean KL in nats a token. Into the dequantized weights only rounding is left: on the embedded model 3e-9 at float32 and
# 1.4e-4 at bfloat16, while one forgotten layer of its 210 costs 3e-4. The other two leave the base that was trained on, at a
# cost that the adapter does not decide (0.33 on the same model); there only a wreck is above the bound.
_MAX_KL = {"float32": 1e-5, "half": 1e-3, "other base": 1.0}


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    into: Sequence[Into] | Into = "nf4-dequantized",
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    data: str | None = None,
    max_kl: float | None = None,
    shard_gb: float = 2.0,
    console: Console | None = None,
) -> Released:
    """Writes base plus adapter as a model that transformers loads, and proves that it is the trained one.

    Args:
        adapter: a folder with a plain LoRA adapter, from this project or another tool.
        out: a folder that is empty or does not exist.
        into: "nf4-dequantized" are the weights that training saw, written as floats. "original" are the base's own, which
            the adapter has never seen. "nf4" is original plus adapter, quantized anew: quantizing the dequantized weights
            plus the adapter would round most of the adapter away. Several give a subfolder each.
        base: instead of the one that the adapter names; as `load_base` takes it.
        revision: of a Hub base; None takes the adapter's.
        dtype: "float32", "bfloat16" or "float16" for what is written. None is float32 for nf4-dequantized and the stored
            one otherwise.
        data: held-out rows for the proof, as `qriemann.evaluation.rows.load_rows` takes them; None for 32 built-in prompts.
        max_kl: largest mean KL to the trained model that is accepted, nats a token; None chooses by base and dtype.
        shard_gb: size of a file, 1e9 bytes; with the 4-bit base, also what the merge needs in memory.
        console: where progress and the table are printed; None for nowhere.

    Returns:
        The result, accepted or not: the caller decides what a rejection means.

    Raises:
        InputError: the adapter is not plain LoRA or does not fit its base, the base cannot be had, `out` holds something,
            the disk is full. Nothing is left behind then.
    """
    bases: tuple[Into, ...] = (into,) if isinstance(into, str) else tuple(dict.fromkeys(into))  # type: ignore[assignment]
    _check_arguments(bases, dtype, max_kl, shard_gb)
    console = console or Console(quiet=True)
    out = Path(out).expanduser()
    check_output(out)
    saved = read_adapter(adapter)
    with quiet(), written_or_nothing(out) as partial:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            recorded = Path(scratch) / "recorded.safetensors"
            trained, rows, recording = proof.load_and_record(saved, base, revision, data, recorded, console)
            # In 4 bit comes last: it replaces the weights of the loaded model.
            order = sorted(bases, key=lambda name: name == "nf4")
            written = {}
            for name in order:
                folder = partial if len(bases) == 1 else partial / name
                console.print(f"Merging into {name} ...", highlight=False)
                stored, worst = _write(trained, folder, name, dtype, int(shard_gb * 1e9))
                bound = _default_max_kl(name, stored) if max_kl is None else max_kl
                written[name] = Written(folder, name, stored, worst, bound)
            described = proof.describe(trained, rows, recording.untrained)
            # Another process is about to load a model, and needs what this one has on the card.
            del trained
            clear_device_cache(garbage_collection=True)
            verdicts = proof.judge([written[name] for name in bases], recording, console)
        content = proof.conclude(described, verdicts)
        write_json(partial / PROOF, content)
        for one in written.values():
            write_json(one.folder / PROOF, {**content, "into": one.into})
            write_card(read_folder(one.folder))
        folder = move_into_place(partial, out, accepted=content["accepted"])
    console.print(proof.table(content))
    for line in content["conclusions"]:
        console.print(line, highlight=False)
    return Released(folder, content["accepted"], verdicts, content)


def _check_arguments(bases: Sequence[str], dtype: str | None, max_kl: float | None, shard_gb: float) -> None:
    known = get_args(Into)
    wrong = [name for name in bases if name not in known]
    if wrong or not bases:
        raise InputError(f"into must be one or several of {', '.join(known)}, got {wrong[0] if wrong else 'none'!r}")
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if max_kl is not None and not max_kl >= 0:
        raise InputError(f"max_kl must be a number of nats >= 0, got {max_kl}")
    if not shard_gb > 0:
        raise InputError(f"shard_gb must be > 0, got {shard_gb}")


def _check_disk(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{place} has {free / 1e9:.1f} GB free, and the model needs {needed / 1e9:.1f} GB; name another output, or write "
            "half precision with --dtype bfloat16"
        )


def _write(
    trained: Trained, folder: Path, into: Into, dtype: str | None, shard_bytes: int
) -> tuple[str, tuple[float, str]]:
    """Writes one model; the dtype that it has, and the worst tensor read back."""
    folder.mkdir(exist_ok=True)
    weights: Mapping[str, Tensor] = trained.dequantized
    if into != "nf4-dequantized":
        weights = original_weights(trained.base, trained.revision)
    modules = tensor_names(trained.adapter.layers, weights, trained.model.base_model_prefix)
    stored = str(weights[next(iter(modules.values()))].dtype).removeprefix("torch.")
    name = dtype or ("float32" if into == "nf4-dequantized" else stored)
    torch_dtype: torch.dtype = getattr(torch, name)
    # In 4 bit: half a byte a weight, and the embeddings in floats.
    _check_disk(folder, trained.model.num_parameters() * (1 if into == "nf4" else torch_dtype.itemsize))
    if into == "nf4":
        expected = _write_4bit(trained, folder, weights, torch_dtype, shard_bytes)
    else:
        config = copy.deepcopy(trained.model.config)
        del config.quantization_config
        config.dtype = torch_dtype
        config.save_pretrained(folder)
        expected = _write_floats(trained, folder, weights, modules, torch_dtype if dtype else None, shard_bytes)
    if trained.model.generation_config is not None:
        # Not save_pretrained: it refuses settings that many a published model has, such as temperature without sampling.
        trained.model.generation_config.to_json_file(folder / "generation_config.json")
    trained.tokenizer.save_pretrained(folder)
    written = Checkpoint(folder)

    def read(name: str) -> Tensor | None:
        if name not in written:
            return None
        return stored_4bit(written, name) if f"{name}.absmax" in written else written[name]

    worst = proof.worst_weight(expected, trained.dequantized if into == "nf4" else weights, read)
    for mapping in (weights, written):
        if isinstance(mapping, Checkpoint):
            mapping.close()
    return name, worst


def _write_floats(
    trained: Trained,
    folder: Path,
    weights: Mapping[str, Tensor],
    modules: dict[str, str],
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> Callable[[str], Tensor]:
    """Writes the sums, and returns how PEFT computes each."""
    module_of = {tensor: module for module, tensor in modules.items()}
    replaced = trained.adapter.replaced

    def rounded(tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.to(dtype or like.dtype) if like.is_floating_point() else tensor

    def merged(name: str) -> Tensor:
        stored = weights[name]
        tensor = replaced.get(name, stored)
        if name in module_of:
            layer, place = trained.adapter.layers[module_of[name]], stored.device
            tensor = torch.addmm(tensor.float(), layer.b.to(place), layer.a.to(place), alpha=layer.scaling)
        return rounded(tensor, stored)

    shapes = ((name, weights[name].to("meta")) for name in weights)
    write_checkpoint(folder, {name: rounded(shape, shape) for name, shape in shapes}, merged, shard_bytes)

    def expected(name: str) -> Tensor:
        stored = weights[name]
        tensor = replaced.get(name, stored)
        if name in module_of:
            tensor = tensor.float() + trained.added(module_of[name]).to(tensor.device)
        return rounded(tensor, stored).cpu()

    return expected


def _write_4bit(
    trained: Trained, folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int
) -> Callable[[str], Tensor]:
    """Quantizes the sums into the loaded model and lets transformers write it; returns how PEFT computes each."""
    from bitsandbytes.functional import dequantize_4bit

    model = trained.peft.unload()
    in_4bit = [name for name, module in model.named_modules() if hasattr(getattr(module, "weight", 0), "quant_state")]
    names = tensor_names(in_4bit, weights, model.base_model_prefix)
    replaced, layers = trained.adapter.replaced, trained.adapter.layers
    for module, tensor_name in names.items():
        layer: Any = model.get_submodule(module)
        weight = weights[tensor_name].float()
        if module in layers:
            weight = torch.addmm(weight, layers[module].b, layers[module].a, alpha=layers[module].scaling)
        layer.weight = quantized_like(weight.to(dtype), layer)
        layer.quant_state = layer.weight.quant_state
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = replaced.get(name, parameter.data).to(parameter.device, dtype)
    model.config.quantization_config.bnb_4bit_compute_dtype = dtype
    model.config.dtype = dtype
    # Its generation settings are written as they are by the caller, and names as the model has them, experts fused.
    generation, model.generation_config = model.generation_config, GenerationConfig()
    model.save_pretrained(folder, max_shard_size=shard_bytes, save_original_format=False)
    model.generation_config = generation

    def expected(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module not in names:
            tensor = replaced.get(name, trained.dequantized[name])
            return tensor.to(dtype).cpu() if tensor.is_floating_point() else tensor.cpu()
        weight = weights[names[module]].float()
        if module in layers:
            weight = weight + trained.added(module).cpu()
        fresh = quantized_like(weight.to(dtype), model.get_submodule(module))
        return dequantize_4bit(fresh.data, fresh.quant_state).cpu()

    return expected


def _default_max_kl(into: str, dtype: str) -> float:
    precision = "float32" if dtype == "float32" else "half"
    return _MAX_KL[precision if into == "nf4-dequantized" else "other base"]
