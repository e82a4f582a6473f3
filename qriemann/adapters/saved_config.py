"""The `adapter_config.json` of a plain LoRA adapter, trained by any tool: which command reads it, before PEFT acts on it."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qriemann.errors import InputError
from qriemann.folder.files import entries, refuse_outside

CONFIG = "adapter_config.json"

COMMANDS = ("inspect", "chat", "eval", "merge", "export")


class Kind(NamedTuple):
    """Adapters that only some commands read."""

    instead: str = "merge it with the tool that trained it"
    commands: tuple[str, ...] = ()
    found: Callable[[Any], bool] = bool


# With one of these keys the trained function is not W + scaling B A on linear layers.
_OTHER_FUNCTIONS = """alora_invocation_tokens arrow_config kasa_config layer_replication megatron_config monteclora_config
    target_parameters use_bdlora use_dora use_qalora velora_config"""
# By the key of `adapter_config.json` that tells them.
KINDS = {
    # A sequence classifier, a reward model: its factors are plain, but it is no language model.
    "task_type": Kind(
        "load and merge it with PEFT's class for that task; inspect shows its factors",
        ("inspect",),
        lambda task: task not in (None, "CAUSAL_LM"),
    ),
    # These starts change the base's own weights, which the folder does not hold.
    "init_lora_weights": Kind(
        "it changes the base's own weights, so save it as PEFT converts it to plain LoRA",
        found=lambda start: str(start).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
    ),
    **dict.fromkeys(_OTHER_FUNCTIONS.split(), Kind()),
}
# The types of the values that are computed with; PEFT checks none.
_TYPES = {"r": int, "lora_alpha": int | float, "rank_pattern": dict | None, "alpha_pattern": dict | None}


def check_config(folder: Path, command: str) -> dict[str, Any]:
    """The checked `adapter_config.json` in the folder, for one of `COMMANDS`; PEFT is not imported."""
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
    for name, wanted in _TYPES.items():
        if not isinstance(content.get(name), wanted):
            raise InputError(f"{name} must not be {content.get(name)!r:.80} in {path}; correct the file")
    for key, kind in KINDS.items():
        if kind.found(content.get(key)) and command not in kind.commands:
            raise InputError(
                f"an adapter must be plain LoRA on linear layers of a causal language model, got {key}="
                f"{content[key]!r:.80} in {path}; {kind.instead}"
            )
    return content


def value_for(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of `rank_pattern` or `alpha_pattern` for a layer: that of the first pattern that matches, as in PEFT."""
    return next((value for pattern, value in (patterns or {}).items() if _compiled(pattern).match(layer)), default)


# re's own cache holds 512, and an 80-layer model has 560 linear layers, each with a pattern perhaps.
@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
