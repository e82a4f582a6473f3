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
from qriemann.base.load import load_base
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
    Renamed,
    Untied,
    original_weights,
    quantized_like,
    stored_4bit,
    tensor_names,
    write_checkpoint,
)
from qriemann.upstream import quiet, untie, was_conv1d

Into = Literal["nf4-dequantized", "original", "nf4"]
_DTYPES = ("float32", "bfloat16", "float16")

# Mean KL in nats a token. Into the base that was trained on only rounding is left: on the embedded model 3e-9 at float32 and
# 1.4e-4 at bfloat16, while one forgotten layer of its 210 costs 3e-4. Leaving that base has a cost that the adapter does not
# decide (0.33 on the same model); there only a wreck is above the bound.
_MAX_KL = {"float32": 1e-5, "half": 1e-3, "other base": 1.0}


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    into: Sequence[Into] | Into | None = None,
    base: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
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
        into: "nf4-dequantized" are the 4-bit weights that training saw, written as floats. "original" are the base's own,
            which an adapter trained in 4 bit has never seen. "nf4" is original plus adapter, quantized anew: quantizing the
            dequantized weights plus the adapter would round most of the adapter away. Several give a subfolder each. None is
            the base that was trained on.
        base: instead of the one that the adapter names; as `load_base` takes it.
        revision: of a Hub base; None takes the adapter's.
        quantize: "nf4" or "none", how the base was in training; None takes what the record beside the adapter says, and
            "nf4" without one.
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
    wanted: Sequence[str] | None = (into,) if isinstance(into, str) else into and tuple(dict.fromkeys(into))
    _check_arguments(wanted, dtype, max_kl, shard_gb)
    console = console or Console(quiet=True)
    out = Path(out).expanduser()
    check_output(out)
    saved = read_adapter(adapter)
    with quiet(), written_or_nothing(out) as partial:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            path = Path(scratch) / "recorded.safetensors"
            trained, rows, recording = proof.load_and_record(saved, base, revision, quantize, data, path, console)
            bases = wanted or (trained.trained_on,)
            if "nf4-dequantized" in bases and not trained.quantized:
                raise InputError(
                    "into must be original or nf4 for an adapter that was trained on an unquantized base, got "
                    f"nf4-dequantized for {saved.folder}; there are no 4-bit weights"
                )
            trained.check_mergeable()
            # In 4 bit comes last: it replaces the weights of the loaded model.
            order = sorted(bases, key=lambda name: name == "nf4")
            written = {}
            for name in order:
                folder = partial if len(bases) == 1 else partial / name
                console.print(f"Merging into {name} ...", highlight=False)
                stored, worst = _write(trained, folder, name, dtype, int(shard_gb * 1e9))
                bound = _default_max_kl(stored, same_base=name == trained.trained_on) if max_kl is None else max_kl
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


def _check_arguments(bases: Sequence[str] | None, dtype: str | None, max_kl: float | None, shard_gb: float) -> None:
    known = get_args(Into)
    wrong = [name for name in bases or () if name not in known]
    if wrong or (bases is not None and not bases):
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
    trained: Trained, folder: Path, into: str, dtype: str | None, shard_bytes: int
) -> tuple[str, tuple[float, str]]:
    """Writes one model; the dtype that it has, and the worst tensor read back."""
    folder.mkdir(exist_ok=True)
    own: Mapping[str, Tensor] = trained.dequantized
    if into != "nf4-dequantized":
        own = original_weights(trained.base, trained.revision)
    # The name that the model has for each tensor: some checkpoints leave out the first part.
    loaded, prefix = set(trained.dequantized), trained.model.base_model_prefix
    weights, full_name = own, {name: name if name in loaded else f"{prefix}.{name}" for name in own}
    if trained.tied is not None:
        head, embeddings = trained.tied
        if trained.untied:
            twin = next(name for name, full in full_name.items() if full == embeddings)
            weights, full_name[head] = Untied(own, head, twin), head
        elif head in own:
            full_name[head] = embeddings
    modules = tensor_names(trained.adapter.layers, weights, prefix)
    stored = str(weights[next(iter(modules.values()))].dtype).removeprefix("torch.")
    name = dtype or ("float32" if into == "nf4-dequantized" else stored)
    torch_dtype: torch.dtype = getattr(torch, name)
    # In 4 bit: half a byte a weight, and the embeddings in floats.
    _check_disk(folder, trained.model.num_parameters() * (1 if into == "nf4" else torch_dtype.itemsize))
    if into == "nf4":
        stored_as = {full: name for name, full in full_name.items()}
        source = Renamed(weights, stored_as, trained.dequantized)
        expected = _write_4bit(trained, folder, source, torch_dtype, shard_bytes)
    else:
        config = copy.deepcopy(trained.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = torch_dtype
        if trained.untied:
            config.tie_word_embeddings = False
        config.save_pretrained(folder)
        expected = _write_floats(trained, folder, weights, full_name, torch_dtype if dtype else None, shard_bytes)
    if trained.model.generation_config is not None:
        # Not save_pretrained: it refuses settings that many a published model has, such as temperature without sampling.
        trained.model.generation_config.to_json_file(folder / "generation_config.json")
    trained.tokenizer.save_pretrained(folder)
    written = Checkpoint(folder)

    def read(name: str) -> Tensor | None:
        if name not in written:
            return None
        return stored_4bit(written, name) if f"{name}.absmax" in written else written[name]

    names = dict.fromkeys([*trained.dequantized, *(trained.tied or ()) * trained.untied]) if into == "nf4" else weights
    worst = proof.worst_weight(expected, names, read)
    for mapping in (own, written):
        if isinstance(mapping, Checkpoint):
            mapping.close()
    return name, worst


def _write_floats(
    trained: Trained,
    folder: Path,
    weights: Mapping[str, Tensor],
    full_name: Mapping[str, str],
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> Callable[[str], Tensor]:
    """Writes the sums, and returns how PEFT computes each."""

    def rounded(tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.to(dtype or like.dtype) if like.is_floating_point() else tensor

    def merged(name: str, *, by_peft: bool = False) -> Tensor:
        stored = weights[name]
        return rounded(trained.as_trained(full_name[name], stored, by_peft=by_peft), stored)

    def shape(name: str) -> Tensor:
        stored = weights[name]
        return rounded(trained.adapter.replaced.get(full_name[name], stored).to("meta"), stored)

    write_checkpoint(folder, {name: shape(name) for name in weights}, merged, shard_bytes)
    return lambda name: merged(name, by_peft=True).cpu()


def _write_4bit(
    trained: Trained,
    folder: Path,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> Callable[[str], Tensor]:
    """Quantizes the sums into a model in 4 bit and lets transformers write it; returns how PEFT computes each.

    Args:
        weights: by the names that the model has.
    """
    from bitsandbytes.functional import dequantize_4bit

    if trained.quantized:
        model: Any = trained.peft.unload()
    else:
        model, _ = load_base(trained.base, dtype="float32", revision=trained.revision)
        trained.adapter.grow_vocabulary(model)
    if trained.untied:
        untie(model)

    def tensor(name: str, *, by_peft: bool = False) -> Tensor:
        """As it was trained, before it is quantized, in the layout that the model has."""
        found = trained.as_trained(name, weights[name], by_peft=by_peft)
        return found.mT if name in in_4bit and was_conv1d(layer_of(name)) else found

    def layer_of(name: str) -> Any:
        return model.get_submodule(name.removesuffix(".weight"))

    in_4bit = {name for name, weight in model.named_parameters() if hasattr(weight, "quant_state")}
    for name in in_4bit:
        layer = layer_of(name)
        layer.weight = quantized_like(tensor(name).to(dtype), layer)
        layer.quant_state = layer.weight.quant_state
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = tensor(name).to(parameter.device, dtype)
    model.config.quantization_config.bnb_4bit_compute_dtype = dtype
    model.config.dtype = dtype
    # Its generation settings are written as they are by the caller, and names as the model has them, experts fused.
    generation, model.generation_config = model.generation_config, GenerationConfig()
    model.save_pretrained(folder, max_shard_size=shard_bytes, save_original_format=False)
    model.generation_config = generation

    def expected(name: str) -> Tensor:
        right = tensor(name, by_peft=True)
        if name not in in_4bit:
            return right.to(dtype).cpu() if right.is_floating_point() else right.cpu()
        fresh = quantized_like(right.to(dtype), layer_of(name))
        return dequantize_4bit(fresh.data, fresh.quant_state).cpu()

    return expected


def _default_max_kl(dtype: str, *, same_base: bool) -> float:
    precision = "float32" if dtype == "float32" else "half"
    return _MAX_KL[precision if same_base else "other base"]
