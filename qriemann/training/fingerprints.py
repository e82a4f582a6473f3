"""What two runs must have in common for one to go on from the other's checkpoint: settings, tokens and base."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qriemann.errors import InputError
from qriemann.training.checkpoints import read_manifest
from qriemann.training.config import RunConfig
from qriemann.training.records import finite

# Settings that shape no step, or whose effect the prints of the tokens and of the base hold; any other must not change.
_FREE = re.compile(
    r"(logging|log|save|eval|hub|push|report|trackio|dataset|ddp)_.*|(per_device_)?eval_.*|output_dir|resume|overwrite|display"
    r"|allow|run_name|project|disable_tqdm|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|in_order"
    r"|multiprocessing_context)|max_(train|eval)_rows|max_skipped_steps|model_name_or_path|model_revision|trust_remote_code"
    r"|per_device_eval_batch_size|prediction_loss_only|include_.*|batch_eval_metrics|do_.*|load_best_model_at_end"
    r"|metric_for_best_model|greater_is_better|use_cpu|debug|skip_memory_metrics|local_rank|torch_empty_cache_steps"
    r"|chat_template_path|eos_token|pad_token|push"
)
# Values of each tensor that enter the print of a base.
_SAMPLE = 64


def fingerprints(config: RunConfig, model: nn.Module, data_print: str) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    settings = {key: value for key, value in config.as_dict().items() if not _FREE.fullmatch(key)}
    return {"settings": json.loads(json.dumps(finite(settings))), "data": data_print, "base": base_fingerprint(model)}


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and evenly spaced values of every tensor of the base, the adapter left out.

    Not over every byte: two bases of one architecture differ nearly everywhere, and an 8B model has gigabytes.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "modules_to_save" in name:
            continue
        values = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if values.numel():
            places = torch.arange(_SAMPLE, device=values.device) * (values.numel() - 1) // (_SAMPLE - 1)
            digest.update(values[places].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
