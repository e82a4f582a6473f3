"""The `adapter_config.json` of a LoRA adapter that anybody may have written, checked before PEFT acts on it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qriemann.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"

# Layer names and short patterns for thousands of layers take less.
_MOST_BYTES = 2**20
# What makes the trained function something else than W + scaling B A on linear layers.
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
# By these, files of Hub repositories ask for Python code that comes with them.
_ASKS_FOR_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
_LEAVES_FOLDER = re.compile(r"[/~]|\\\\|[A-Za-z]:[\\/]|\.\.\\|(.*/)?\.\.(/|$)", re.DOTALL)
# The base is the one thing outside of the folder that a configuration has to name; loading it runs no code of its own.
_MAY_BE_OUTSIDE = ("base_model_name_or_path",)
_NAME = re.compile(r"[\w.-]+")
_OPERATOR, _REPEATED_GROUP = re.compile(r"[*+?{|]"), re.compile(r"\)[*+?{]")
# A pattern of so many operators takes microseconds on any layer's name; a clever one of more takes for ever.
_MOST_OPERATORS, _MOST_OPERATORS_IN_ALL = 2, 16
# Each is tried on each layer's name: a key for every linear layer of an 80-layer model is 560.
_MOST_PATTERNS = 1000


def check_config(folder: Path) -> dict[str, Any]:
    """The content of the configuration of the plain LoRA adapter in the folder; PEFT is not imported.

    Raises:
        InputError: there is none, it is broken or not of plain LoRA, or it asks for code or for files outside of the folder.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"an adapter must be a folder with an {CONFIG}, got {folder}; check the path")
    content = _read_object(path)
    _refuse_what_reaches_out(content, path)
    if content.get("peft_type") != "LORA":
        raise InputError(f"an adapter must be LoRA, got {content.get('peft_type')!r} in {path}; merge it with PEFT")
    for name, (holds, rule) in _RULES.items():
        if name in content and not holds(content[name]):
            raise InputError(f"{name} must be {rule}, got {content[name]!r:.80} in {path}; correct the file")
    flags = [name for name in _NOT_PLAIN if content.get(name)]
    start = str(content.get("init_lora_weights"))
    if flags or start.startswith(_CHANGES_BASE):
        got = flags[0] if flags else f"init_lora_weights={start!r}, which changes the base's own weights"
        raise InputError(
            f"an adapter must be plain LoRA on linear layers, got {got} in {path}; merge it with the tool that trained it"
        )
    # PEFT's own values for what a file leaves out.
    return {"r": 8, "lora_alpha": 8, **content}


def read_config(folder: Path) -> LoraConfig:
    """The same, as PEFT reads it.

    Raises:
        InputError: as `check_config`, or PEFT does not read it.
    """
    from peft import PeftConfig

    check_config(folder)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT looks into values without asking for their types.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{CONFIG} must be one that PEFT reads, got {folder / CONFIG}: {reason}; check the file"
        ) from error


def value_for(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of a layer; the first pattern that matches, as in PEFT."""
    matches = (value for pattern, value in (patterns or {}).items() if _compiled(pattern).match(layer))
    return next(matches, default)


# re's own cache holds 512.
@functools.lru_cache(maxsize=2 * _MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        content = json.loads(path.read_text(encoding="utf-8")) if size <= _MOST_BYTES else f"{size} bytes"
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} must be readable JSON, got {type(error).__name__}; copy the adapter again") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} must be a JSON object of at most {_MOST_BYTES} bytes, got {content!r:.80}; copy the adapter again"
        )
    return content


def _refuse_what_reaches_out(content: dict[str, Any], path: Path) -> None:
    for key, value in entries(content):
        if key in _ASKS_FOR_CODE and value:
            raise InputError(
                f"an adapter must not ask for code to be run, got {key} in {path}; remove the key if you trust the rest"
            )
        if key not in _MAY_BE_OUTSIDE:
            refuse_outside(path, key, value, "remove it or copy it there")


def refuse_outside(path: Path | str, key: str, value: Any, remedy: str) -> None:
    """Raises InputError if `value`, which the file at `path` has for `key`, is a path out of that file's folder."""
    if isinstance(value, str) and _LEAVES_FOLDER.match(value):
        raise InputError(f"a path in {path} must stay in its folder, got {value!r:.80} for {key!r:.80}; {remedy}")


def entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value with the key that it is under, at any depth; no recursion, because the depth is a stranger's choice."""
    pending = [("", content)]
    while pending:
        key, value = pending.pop()
        yield key, value
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in value)


def _patterns(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is None or maps patterns, which Python's engine is through with at once, to what holds."""

    def are_patterns(value: Any) -> bool:
        if not value:
            return value is None or value == {}
        if not isinstance(value, dict) or len(value) > _MOST_PATTERNS or not all(map(holds, value.values())):
            return False
        operators = [len(_OPERATOR.findall(pattern)) for pattern in value]
        cheap = max(operators) <= _MOST_OPERATORS and sum(operators) <= _MOST_OPERATORS_IN_ALL
        return cheap and all(_compiles(pattern) for pattern in value)

    return are_patterns


def _compiles(pattern: str) -> bool:
    try:
        re.compile(f"({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return not _REPEATED_GROUP.search(pattern)


_SHORT_PATTERNS = f"at most {_MOST_PATTERNS} names of layers, or patterns of at most {_MOST_OPERATORS} operators, with "
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "an integer of at least 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "target_modules": (lambda value: isinstance(value, str) or _are_names(value), "names of layers or one pattern"),
    "exclude_modules": (
        lambda value: value is None or isinstance(value, str) or _are_names(value),
        "names of layers or one pattern",
    ),
    "modules_to_save": (lambda value: value is None or _are_names(value), "names of modules"),
    "rank_pattern": (_patterns(_is_rank), f"{_SHORT_PATTERNS}integers of at least 1"),
    "alpha_pattern": (_patterns(_is_number), f"{_SHORT_PATTERNS}finite numbers"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a name or a folder"),
    "revision": (lambda value: value is None or isinstance(value, str), "a name or a hash"),
    "task_type": (lambda value: value is None or isinstance(value, str), "a name"),
}
