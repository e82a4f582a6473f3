"""The `adapter_config.json` of a plain LoRA adapter, trained by any tool, checked before PEFT acts on it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qriemann.base.paths import entries, refuse_outside
from qriemann.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"

# With one of these the trained function is not W + scaling B A on linear layers.
_NOT_PLAIN = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# These starts change the base's own weights, which the folder does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The types of the values that are computed with; PEFT checks none.
_TYPES = {"r": int, "lora_alpha": int | float, "rank_pattern": dict | None, "alpha_pattern": dict | None}


def check_config(folder: Path) -> dict[str, Any]:
    """The content of the configuration of the plain LoRA adapter in the folder; PEFT is not imported.

    Raises:
        InputError: there is none, it is broken or not of plain LoRA, or it names files outside the folder.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file, so the folder holds no adapter; check the path")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({type(error).__name__}); copy the adapter again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(content).__name__}; copy the adapter again")
    for key, value in entries(content):
        # The base is the one thing outside the folder that a configuration has to name.
        if key != "base_model_name_or_path":
            refuse_outside(path, key, value, "remove it or copy it there")
    if content.get("peft_type") != "LORA":
        raise InputError(f"an adapter must be LoRA, got {content.get('peft_type')!r} in {path}; merge it with PEFT")
    # PEFT's own defaults for keys that the file leaves out.
    content = {"r": 8, "lora_alpha": 8, **content}
    for name, kind in _TYPES.items():
        if not isinstance(content.get(name), kind):
            raise InputError(f"{name} must not be {content.get(name)!r:.80} in {path}; correct the file")
    start = str(content.get("init_lora_weights"))
    found = [name for name in _NOT_PLAIN if content.get(name)]
    if start.startswith(_CHANGES_BASE):
        found.append(f"init_lora_weights={start!r}, which changes the base's own weights")
    if found:
        raise InputError(
            f"an adapter must be plain LoRA on linear layers, got {found[0]} in {path}; merge it with the tool that trained "
            "it"
        )
    return content


def read_config(folder: Path) -> LoraConfig:
    """The same as PEFT reads it.

    Raises:
        InputError: as `check_config`, or PEFT refuses it.
    """
    from peft import PeftConfig

    check_config(folder)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT does not check the types of most values.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"PEFT cannot read {folder / CONFIG}: {reason}; check the file") from error


def value_for(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of `rank_pattern` or `alpha_pattern` for a layer: that of the first pattern that matches, as in PEFT."""
    return next((value for pattern, value in (patterns or {}).items() if _compiled(pattern).match(layer)), default)


# re's own cache holds 512, and an 80-layer model has 560 linear layers, each with a pattern perhaps.
@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
