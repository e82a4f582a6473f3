"""What two runs must have in common for one to go on from the other's checkpoint: settings, tokens and base."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qriemann.errors import InputError
from qriemann.publish.folder import read_json
from qriemann.training.checkpoints import read_manifest
from qriemann.training.records import RUN, finite

if TYPE_CHECKING:
    # TRL, which it imports, takes a second that `chat` need not wait.
    from qriemann.training.config import RunConfig

# Settings that shape no step, or whose effect the prints of the tokens and of the base hold; any other must not change.
_FREE = re.compile(
    r"(logging|log|save|eval|hub|push|report|trackio|dataset|ddp)_.*|(per_device_)?eval_.*|output_dir|resume|overwrite|display"
    r"|allow|run_name|project|disable_tqdm|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|in_order"
    r"|multiprocessing_context)|max_(train|eval)_rows|max_skipped_steps|model_name_or_path|model_revision|trust_remote_code"
    r"|per_device_eval_batch_size|prediction_loss_only|include_.*|batch_eval_metrics|do_.*|load_best_model_at_end"
    r"|metric_for_best_model|greater_is_better|use_cpu|debug|skip_memory_metrics|local_rank|torch_empty_cache_steps"
    r"|chat_template_path|eos_token|pad_token|push"
)
# What PEFT adds to the names of a base that it wraps.
_PEFT_NAMES = re.compile(r"^base_model\.model\.|\.base_layer\b|\.original_module\b")
# Elements of a tensor that are copied at a time: a whole embedding would need a gigabyte beside the model.
_CHUNK = 2**24


def fingerprints(config: RunConfig, model: nn.Module, data_print: str) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    settings = {key: value for key, value in config.as_dict().items() if not _FREE.fullmatch(key)}
    return {"settings": json.loads(json.dumps(finite(settings))), "data": data_print, "base": base_fingerprint(model)}


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the name, shape and bytes of every parameter of the base, and the scales of the 4-bit ones.

    The adapter is left out, and so are the parts of names that PEFT adds. Floats enter in bfloat16: a base that is loaded in
    another dtype, and whose 4-bit codes come out the same, is the same.

    Cost: 0.4 s for the embedded model on one core, 111 MB; 3 s for each GB.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "modules_to_save" in name:
            continue
        digest.update(f"{_PEFT_NAMES.sub('', name)} {tuple(parameter.shape)}".encode())
        state: Any = getattr(parameter, "quant_state", None)
        scales = [] if state is None else [state.absmax, *((state.offset, state.state2.absmax) if state.nested else ())]
        for chunk in parameter.detach().reshape(-1).split(_CHUNK):
            floats = chunk.is_floating_point() and state is None
            digest.update(_as_bytes(chunk.to(torch.bfloat16) if floats else chunk))
        for tensor in scales:
            digest.update(_as_bytes(tensor))
    return digest.hexdigest()


def describe_base(model: PreTrainedModel, fingerprint: str) -> dict[str, Any]:
    """What `run.json` says of the base, for `other_base` to compare."""
    return {"fingerprint": fingerprint, **_loaded_as(model)}


def other_base(folder: Path, model: PreTrainedModel, name: str) -> str | None:
    """A line if the base is not the one that the run in the folder trained on.

    None where nothing says what that was, or where the two do not compare: in floats against 4 bit, or on another kind of
    device, whose rounding gives other codes.

    Args:
        folder: of an adapter.
        model: the base, before PEFT wraps it.
        name: of the base, for the line.
    """
    recorded, loaded = read_json(folder / RUN).get("model"), _loaded_as(model)
    if not isinstance(recorded, dict) or any(recorded.get(key) != loaded[key] for key in ("quantized", "device")):
        return None
    before, now = str(recorded.get("fingerprint")), base_fingerprint(model)
    if before == now:
        return None
    rounding = (
        ""
        if recorded.get("dtype") == loaded["dtype"]
        else (
            f", or a base that {loaded['dtype']} quantizes otherwise than {recorded.get('dtype')}, in which it was trained"
        )
    )
    return f"trained on another revision of {name}{rounding}: its fingerprint is {now[:12]}, that of training {before[:12]}"


def _loaded_as(model: PreTrainedModel) -> dict[str, Any]:
    quantized = any(hasattr(parameter, "quant_state") for parameter in model.parameters())
    dtype = model.get_input_embeddings().weight.dtype
    return {"quantized": quantized, "device": model.device.type, "dtype": str(dtype).removeprefix("torch.")}


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data


def check_same_run(checkpoint: Path, now: Mapping[str, Any], allow: Collection[str]) -> None:
    """Raises InputError, naming it, if anything changed since the checkpoint that is not in `allow`."""
    before = (read_manifest(checkpoint) or {}).get("run", {})
    changes = {}
    for name, what in (("data", "the rows that the run started with"), ("base", "the base that the run started with")):
        if name in before and before[name] != now[name]:
            changes[name] = f"not {what}"
    settings = before.get("settings", now["settings"])
    for key in sorted(settings.keys() | now["settings"].keys()):
        old, new = settings.get(key), now["settings"].get(key)
        if old != new:
            changes[key] = f"{key} {new!r} instead of {old!r}"
    changes = {name: text for name, text in changes.items() if name not in allow}
    if changes:
        raise InputError(
            f"resume must go on with what {checkpoint} was made of, got {', '.join(changes.values())}; restore that, start "
            f"anew with --overwrite, or add --allow {' '.join(changes)} if you mean it"
        )
