"""`merge`: a LoRA adapter into the weights of its base, tensor by tensor, and the proof that it came out right."""

import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from accelerate.utils.memory import clear_device_cache
from rich.console import Console
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from qriemann.adapters.saved import read_adapter
from qriemann.base.tensors import Tensors
from qriemann.checkpoints.fingerprints import loaded_as
from qriemann.errors import InputError
from qriemann.evaluation import proof
from qriemann.evaluation.proof import Candidate
from qriemann.evaluation.trained import Trained
from qriemann.folder.contents import PROOF, read_folder
from qriemann.folder.files import check_output
from qriemann.folder.records import write_json
from qriemann.release.atomic_folder import Released, move_into_place, written_or_nothing
from qriemann.release.card import write_card
from qriemann.release.weights import (
    original_weights,
    quantized,
    read_checkpoint,
    stored_4bit,
    tensor_names,
    write_checkpoint,
)
from qriemann.upstream import is_4_bit, quiet, was_conv1d

Into = Literal["nf4-dequantized", "original", "nf4"]
_DTYPES = ("float32", "bfloat16", "float16")

# Mean KL in nats a token. Into the base that was trained on only rounding is left: on the embedded model 3e-9 at float32 and
# 1.4e-4 at bfloat16, while one forgotten layer of its 210 costs 3e-4. Leaving that base has a cost that the adapter does not
# decide (0.33 on the same model); there the bound only catches a broken model.
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
                    f"{saved.folder} was trained on an unquantized base: --into original or nf4, not nf4-dequantized"
                )
            trained.check_mergeable()
            candidates = []
            for name in bases:
                folder = partial if len(bases) == 1 else partial / name
                console.print(f"Merging into {name} ...", highlight=False)
                stored, worst = _write(trained, folder, name, dtype, int(shard_gb * 1e9))
                kind = "other base" if name != trained.trained_on else "float32" if stored == "float32" else "half"
                bound = _MAX_KL[kind] if max_kl is None else max_kl
                candidates.append(Candidate(folder, name, stored, worst, bound))
            described = proof.describe(trained, rows, recording.untrained)
            # Another process is about to load a model, and needs what this one has on the card.
            del trained
            clear_device_cache(garbage_collection=True)
            verdicts = proof.judge(candidates, recording, console)
        content = proof.conclude(described, verdicts)
        write_json(partial / PROOF, content)
        for one in candidates:
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


def _write(
    trained: Trained, folder: Path, into: str, dtype: str | None, shard_bytes: int
) -> tuple[str, tuple[float, str]]:
    """Writes one model; the dtype that it has, and the worst tensor read back."""
    folder.mkdir(exist_ok=True)
    weights, full_name, stored = _sources(trained, into)
    torch_dtype = getattr(torch, dtype) if dtype else torch.float32 if into == "nf4-dequantized" else stored
    # In 4 bit: half a byte a weight, and the embeddings in floats.
    needed = trained.model.num_parameters() * (1 if into == "nf4" else torch_dtype.itemsize)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free of {needed / 1e9:.1f} that are needed; name another, or --dtype bfloat16"
        )
    in_4bit = _layers_in_4bit(trained) if into == "nf4" else {}
    # As the base of training was, or as `load_base` does it.
    loaded = loaded_as(trained.model)
    quant_type, double_quant = loaded["quant_type"] or "nf4", loaded["double_quant"] is not False

    def in_parts(name: str, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.to(trained.model.device)
        return quantized(name, weight, quant_type=quant_type, double_quant=double_quant)

    def value(name: str, *, by_peft: bool = False) -> Tensor:
        """A tensor as it was trained, rounded as it is written, in the layout of a 4-bit layer if it becomes one."""
        before = weights[name]
        found = trained.as_trained(full_name[name], before, by_peft=by_peft)
        if found.is_floating_point():
            found = found.to(torch_dtype if dtype or into == "nf4" else before.dtype)
        return found.mT.contiguous() if in_4bit.get(name) else found

    def tensors_of(name: str) -> dict[str, Tensor]:
        return in_parts(name, value(name)) if name in in_4bit else {name: value(name)}

    def shape(name: str) -> Tensor:
        before = weights[name]
        found = trained.adapter.replaced.get(full_name[name], before).to("meta", before.dtype)
        if name in in_4bit:
            return found.new_empty(found.numel() // 2, dtype=torch.uint8)
        return found.to(torch_dtype) if found.is_floating_point() and (dtype or into == "nf4") else found

    def expected(name: str) -> Tensor:
        right = value(name, by_peft=True)
        return stored_4bit(in_parts(name, right), name) if name in in_4bit else right.cpu()

    config = copy.deepcopy(trained.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if in_4bit:
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch_dtype,
        )
    config.dtype = torch_dtype
    if trained.untied:
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    write_checkpoint(folder, {name: shape(name) for name in weights}, tensors_of, shard_bytes)
    if trained.model.generation_config is not None:
        # Not save_pretrained: it refuses settings that many a published model has, such as temperature without sampling.
        trained.model.generation_config.to_json_file(folder / "generation_config.json")
    trained.tokenizer.save_pretrained(folder)
    written = read_checkpoint(folder)

    def read(name: str) -> Tensor | None:
        if name not in written:
            return None
        return stored_4bit(written, name) if name in in_4bit else written[name]

    return str(torch_dtype).removeprefix("torch."), proof.worst_weight(expected, weights, read)


def _sources(trained: Trained, into: str) -> tuple[Tensors, dict[str, str], torch.dtype]:
    """The base's weights under the names to write, the model's name for each, and the dtype of the adapted layers.

    Floats get the names of the base's checkpoint, 4-bit models those of the loaded model. Where training gave the tied head
    and embeddings two values, the head has a name of its own.
    """
    weights = trained.dequantized if into == "nf4-dequantized" else original_weights(trained.base, trained.revision)
    # Some checkpoints leave out the first part of a name.
    prefix = trained.model.base_model_prefix
    full_name = {name: name if name in trained.dequantized else f"{prefix}.{name}" for name in weights}
    if trained.tied is not None:
        head, embeddings = trained.tied
        if trained.untied:
            own, twin = weights, next(name for name, full in full_name.items() if full == embeddings)
            full_name[head] = head
            weights = Tensors(full_name, lambda name: own[twin if name == head else name])
        elif head in weights:
            full_name[head] = embeddings
    layers = tensor_names(trained.adapter.layers, weights, prefix)
    stored = weights[next(iter(layers.values()))].dtype
    if into != "nf4":
        return weights, full_name, stored
    of_checkpoint, stored_as = weights, {full: name for name, full in full_name.items()}
    names = dict.fromkeys([*trained.dequantized, *(trained.tied or ()) * trained.untied])
    # What the checkpoint has in another form, such as experts one by one, is taken as it was loaded.
    by_model = Tensors(
        names, lambda name: of_checkpoint[stored_as[name]] if name in stored_as else trained.dequantized[name]
    )
    return by_model, {name: name for name in names}, stored


def _layers_in_4bit(trained: Trained) -> dict[str, bool]:
    """The tensors that `load_base` holds in 4 bit, each with whether a checkpoint has it transposed."""
    head = trained.model.get_output_embeddings()
    found = {}
    for name, layer in trained.model.named_modules():
        tensor = f"{name.removesuffix('.base_layer')}.weight"
        linear = isinstance(layer, nn.Linear | Conv1D) and layer is not getattr(head, "base_layer", head)
        if tensor in trained.dequantized and (is_4_bit(layer) if trained.quantized else linear):
            found[tensor] = isinstance(layer, Conv1D) or was_conv1d(layer)
    return found
