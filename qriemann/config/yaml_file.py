"""The YAML file of a run: what may stand in it, whatever the keys mean."""

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from qriemann.config.values import shown
from qriemann.errors import InputError

# Of a configuration file: the longest is a rank for each of a thousand layers.
_MOST_CHARACTERS, _DEEPEST = 2**16, 20
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# What a process can hand to another: no NUL, no half of a surrogate pair.
_ENCODABLE = re.compile(r"[^\0\ud800-\udfff]*")


class _Loader(yaml.SafeLoader):
    """YAML without what a flat file of settings has no use for: aliases and merges, which unfold without end, and depth."""

    # A date is a string to every key.
    yaml_implicit_resolvers: ClassVar = {
        first: [rule for rule in rules if not rule[0].endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias; write the value out", problem_mark=mark)
        if self.depth == _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem="a merge key <<; write the keys out", problem_mark=key.start_mark)
            if str(key.value) in names:
                raise yaml.MarkedYAMLError(problem=f"{shown(key.value)} a second time", problem_mark=key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_config_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a file as YAML gives them, and the environment variables under its key env.

    Raises:
        InputError: it cannot be read, is no mapping, is too long or too deep, repeats a key, has an alias or a merge, or
            its env is no mapping of names to values.
    """
    text = _read_text(Path(path))
    try:
        content = yaml.load(text, _Loader)
    # It raises whatever its conversions do: ValueError for a number of too many digits, KeyError for `!!bool foo`.
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or f"{type(error).__name__}: {error}").split())
        raise InputError(f"{path} must be valid YAML, got: {problem:.120}{where}; correct it") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} must be a mapping of keys to values, got {type(content).__name__}; write `key: value` lines"
        )
    environment = _environment(content.pop("env", None) or {}, path)
    return content, environment


def _read_text(path: Path) -> str:
    try:
        # What is no file may be a pipe, which opening waits for.
        if path.exists() and not path.is_file():
            raise InputError(
                f"the configuration must be a readable YAML file, got {path}, which is no file; check the path"
            )
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"the configuration must be a readable YAML file, got {path}: {reason}; check the path"
        ) from error
    if len(text) > _MOST_CHARACTERS:
        raise InputError(
            f"the configuration must have at most {_MOST_CHARACTERS} characters, got more in {path}; shorten it"
        )
    return text


def _environment(values: Any, path: Any) -> dict[str, str]:
    """The variables of the key env; no message repeats a value of theirs."""
    if not isinstance(values, dict):
        raise InputError(
            f"env must be a mapping of names to values, got a {type(values).__name__} in {path}; write `name: value` lines"
        )
    for name, value in values.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise InputError(
                f"env must name variables by letters, digits and _, got {shown(name)} in {path}; rename it"
            )
        if not isinstance(value, str | int | float) or not _ENCODABLE.fullmatch(str(value)):
            raise InputError(
                f"{name} in env must be a string or a number, got something else in {path}; correct the value"
            )
    return {name: str(value) for name, value in values.items()}
