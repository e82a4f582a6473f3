"""What a run must share with a checkpoint to resume from it: settings, tokens and base."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from qriemann.checkpoints.manifest import read_manifest
from qriemann.distributed import process_count
from qriemann.errors import InputError
from qriemann.folder.records import finite

# Settings that may change on resume: they change no step, or the fingerprints of tokens and base cover their effect. Add
# every new setting here that cannot change a step, or resuming refuses it.
_FREE = re.compile(
    r"(logging|log|save|eval|hub|push|report|trackio|dataset|ddp)_.*|(per_device_)?eval_.*|output_dir|resume|overwrite|display|dry_run"
    r"|resume_from_checkpoint|allow|run_name|project|disable_tqdm|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|in_order"
    r"|multiprocessing_context)|max_(train|eval)_rows|max_skipped_steps|model_name_or_path|model_revision|trust_remote_code"
    r"|per_device_eval_batch_size|prediction_loss_only|include_.*|batch_eval_metrics|do_.*|load_best_model_at_end"
    r"|metric_for_best_model|greater_is_better|use_cpu|debug|skip_memory_metrics|local_rank|torch_empty_cache_steps"
    r"|chat_template_path|eos_token|pad_token|push"
)
# Settings that a resumed run does not use.
_OF_THE_START = ("start", "alpha", "init", "init_kwargs")
# Entries of a model's configuration that shape no step, or that the settings and the weights' fingerprint cover.
_FREE_OF_MODEL = re.compile(
    r"_.*|.*name_or_path|.*version|(torch_)?dtype|quantization_config|architectures|use_cache|(pad|bos|eos)_token_id"
    r"|output_.*|return_dict|id2label|label2id|tie_encoder_decoder|task_specific_params|problem_type|is_.*|finetuning_task"
)
# What PEFT adds to the names of a base that it wraps.
_PEFT_NAMES = re.compile(r"^base_model\.model\.|\.(token_adapter|base_layer|original_module)\b")
# Elements of a tensor that are copied at a time; a whole embedding would take a gigabyte.
_CHUNK = 2**24


def fingerprints(settings: Mapping[str, Any], model: Any, data_print: str | None) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    model_config = model.config.to_dict() if isinstance(getattr(model, "config", None), PreTrainedConfig) else {}
    base, base_floats = _base_fingerprints(model)
    prints = {
        "settings": {key: value for key, value in settings.items() if not _FREE.fullmatch(key)},
        "processes": process_count(),
        "data": data_print,
        "base": base,
        "base_floats": base_floats,
        "loaded": {**loaded_as(model), "fingerprint": base},
        "base_config": {key: value for key, value in model_config.items() if not _FREE_OF_MODEL.fullmatch(key)},
    }
    # Round-tripped through JSON to compare equal to a manifest; objects become their type name, since a repr may contain an
    # address.
    return json.loads(json.dumps(finite(prints), default=lambda value: type(value).__name__))


def fingerprints_of_trainer(trainer: Trainer) -> dict[str, Any]:
    """The same for a trainer that a script made: its arguments, its optimizer's options and its dropout.

    Rows that are not a `datasets.Dataset` have no fingerprint.
    """
    _, options = trainer.optimizer_cls_and_kwargs or (None, {})
    adapters = getattr(trainer.model, "peft_config", {})
    settings = {
        **trainer.args.to_dict(),
        **{f"optimizer_{key}": value for key, value in options.items()},
        # Attaching changes rank and alpha.
        "lora_dropout": {name: getattr(adapter, "lora_dropout", None) for name, adapter in adapters.items()},
    }
    rows = trainer.train_dataset
    return fingerprints(settings, trainer.model, _rows_fingerprint(rows) if isinstance(rows, Dataset) else None)


def _rows_fingerprint(rows: Dataset) -> str:
    """SHA-256 over all columns, in order. `datasets` has its own, which is random after a function that it cannot hash."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        digest.update(repr(batch.to_pydict()).encode(errors="surrogatepass"))
    return digest.hexdigest()


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the name, shape and bytes of every parameter of the base, and the scales of the 4-bit ones.

    Leaves out the adapter and what PEFT adds to names. Rounds floats to bfloat16, so a base that is loaded in another dtype
    and quantizes to the same 4-bit codes is the same.

    Cost: 0.4 s for the embedded model on one core, 111 MB; 3 s for each GB.
    """
    return _base_fingerprints(model)[0]


def _base_fingerprints(model: nn.Module) -> tuple[str, str]:
    """`base_fingerprint`, and the SHA-256 over the floats that it rounds, to their last bit."""
    rounded, exact = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".lora_", "modules_to_save", "trainable_tokens_delta")):
            continue
        rounded.update(f"{_PEFT_NAMES.sub('', name)} {tuple(parameter.shape)}".encode())
        state: Any = getattr(parameter, "quant_state", None)
        rounds = parameter.is_floating_point() and state is None and parameter.dtype is not torch.bfloat16
        if rounds:
            exact.update(str(parameter.dtype).encode())
        for chunk in parameter.detach().reshape(-1).split(_CHUNK):
            rounded.update(_as_bytes(chunk.to(torch.bfloat16) if rounds else chunk))
            if rounds:
                exact.update(_as_bytes(chunk))
        if state is not None:
            for scales in (state.absmax, *((state.offset, state.state2.absmax) if state.nested else ())):
                rounded.update(_as_bytes(scales))
    return rounded.hexdigest(), exact.hexdigest()


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data


def other_base(recorded: Mapping[str, Any], model: PreTrainedModel, name: str) -> str | None:
    """A line if the base is not the one that was trained on.

    None where no record says what that was, and where the two do not compare: floats with 4 bit, or another kind of device,
    whose rounding gives other codes.
    """
    loaded = loaded_as(model)
    if not recorded.get("fingerprint") or any(recorded.get(key) != loaded[key] for key in ("quantized", "device")):
        return None
    before, now = str(recorded["fingerprint"]), base_fingerprint(model)
    if before == now:
        return None
    return f"trained on another revision of {name}: its fingerprint is {now[:12]}, that of training {before[:12]}"


def loaded_as(model: Any) -> dict[str, Any]:
    """How a base was loaded, as `recorded_base` finds it in a record; the first quantized layer stands for all."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    state: Any = next((state for state in states if state is not None), None)
    floats = (p for name, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in name)
    # In a model of another library the first floats stand for its embeddings.
    embeddings = model.get_input_embeddings().weight if hasattr(model, "get_input_embeddings") else next(floats)
    return {
        "quantized": state is not None,
        "quant_type": state and state.quant_type,
        "double_quant": state and bool(state.nested),
        "device": getattr(model, "device", embeddings.device).type,
        "dtype": str(embeddings.dtype).removeprefix("torch."),
    }


def check_same_run(
    checkpoint: Path,
    now: Mapping[str, Any],
    allow: Collection[str],
    *,
    remedy: str = "start anew with --overwrite, or add --allow {}",
) -> list[str]:
    """What changed since the checkpoint, each in a few words; InputError for what is not in `allow`.

    Args:
        checkpoint: one without a manifest, or of an older version, says less or nothing.
        remedy: what to do instead of restoring it; {} stands for the names.
    """
    before = {**now, **(read_manifest(checkpoint) or {}).get("run", {})}
    changes = {}
    if before["data"] != now["data"]:
        changes["data"] = "not the rows that the run started with"
    old, new = before["base_config"], now["base_config"]
    # Ignore keys that only one side has: they come from another transformers version.
    configured = _changes(old, new, old.keys() & new.keys())
    if any(before[key] != now[key] for key in ("base", "base_floats")):
        changes["base"] = "not the base that the run started with"
    elif configured:
        changes["base"] = f"a base configured otherwise ({', '.join(configured.values())})"
    if before["processes"] != now["processes"]:
        changes["processes"] = f"{now['processes']} processes instead of {before['processes']}"
    old, new = before["settings"], now["settings"]
    changes |= _changes(old, new, old.keys() | new.keys())
    refused = {name: text for name, text in changes.items() if name not in allow}
    if refused:
        raise InputError(
            f"resume must continue the run that wrote {checkpoint}, got {', '.join(refused.values())}; restore it, "
            f"{remedy.format(' '.join(refused))} if you mean it"
        )
    return [f"{text} (it shaped the start alone)" if name in _OF_THE_START else text for name, text in changes.items()]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], keys: Collection[str]) -> dict[str, str]:
    """What to say of each of the keys whose values differ."""
    differing = (key for key in sorted(keys) if old.get(key) != new.get(key))
    return {key: f"{key} {new.get(key)!r} instead of {old.get(key)!r}" for key in differing}
