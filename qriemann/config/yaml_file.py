"""The YAML file of a run: a flat mapping of keys to values, read without importing anything heavy."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from qriemann.config.values import shown
from qriemann.errors import InputError

_WORD = "tag:yaml.org,2002:str"
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `no`, `off` and dates are words, 1e-4 is a number. A repeated key is an error.

    The keys of the file have types, which make `no` of a word what it must be. Inside a value nothing does, so there the word
    is YAML 1.1's truth value, as TRL reads it.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [rule for rule in rules if rule[0].rpartition(":")[2] not in ("timestamp", "bool", "float")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        inside = bool(node.flow_style or node.start_mark.column)
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in names:
                raise yaml.MarkedYAMLError(problem=f"{shown(key.value)} a second time", problem_mark=key.start_mark)
            names.add(str(key.value))
            if inside and value.tag == _WORD and value.style is None and value.value.lower() in self.bool_values:
                value.tag = "tag:yaml.org,2002:bool"
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?i:true|false)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(?i:inf)|\.(?i:nan))$", re.ASCII
    ),
    list("-+.0123456789"),
)


def read_value(text: str, kinds: tuple[type, ...]) -> Any:
    """The text as the file would read it, if that gives one of the kinds; otherwise the text itself."""
    try:
        value = yaml.load(text, _Loader)
    except Exception:  # as in `read_config_file`
        return text
    return value if isinstance(value, kinds) else text


def read_config_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a file as YAML gives them, and the environment variables under its key `env`.

    Raises:
        InputError: the file cannot be read, is not a mapping or repeats a key; `env` is not a mapping of names to values.
    """
    text = _read_text(Path(path))
    try:
        content = yaml.load(text, _Loader)
    # Its conversions raise whatever they like: KeyError for `!!bool foo`, ValueError for a number of 5,000 digits.
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or f"{type(error).__name__}: {error}").split())
        raise InputError(f"{path} is not valid YAML{where}: {problem:.120}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} must be a mapping of keys to values, got {type(content).__name__}; write `key: value`"
        )
    return content, _environment(content.pop("env", None) or {}, path)


def _read_text(path: Path) -> str:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    # Opening a pipe would wait for its other end.
    if not path.is_file():
        raise InputError(f"{path} is not a file; name a YAML file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _environment(values: Any, path: Any) -> dict[str, str]:
    """The variables of the key `env`; no message repeats a value of theirs."""
    if not isinstance(values, dict):
        raise InputError(f"env must be a mapping of names to values in {path}, got a {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise InputError(f"env must name variables by letters, digits and _ in {path}, got {shown(name)}")
        if not isinstance(value, str | int | float) or "\0" in str(value):
            raise InputError(f"{name} in env must be a string or a number in {path}, got something else")
    return {name: str(value) for name, value in values.items()}
