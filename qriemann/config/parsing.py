"""What a person wrote about a run: a YAML file, flat keys with values, and `--key value` pairs of a command line."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qriemann.config.values import Loader, kinds, nearest, shown
from qriemann.errors import InputError


def read_config_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a file as YAML gives them, and the environment variables under its key `env`."""
    # Opening a pipe would wait for its other end.
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; name a YAML file" if Path(path).exists() else f"{path}: no such file")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    # Its conversions raise whatever they like: KeyError for `!!bool foo`, ValueError for a number of 5,000 digits.
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or f"{type(error).__name__}: {error}").split())
        raise InputError(f"{path} is not valid YAML{where}: {problem:.120}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must be a mapping, `key: value`, got {type(content).__name__}")
    environment = content.pop("env", None) or {}
    # No message repeats a value of theirs.
    if not isinstance(environment, dict):
        raise InputError(f"env must be a mapping of names to values in {path}, got a {type(environment).__name__}")
    for name, value in environment.items():
        if not str(name).isidentifier() or not isinstance(value, str | int | float) or "\0" in str(value):
            raise InputError(
                f"env in {path} must map names of letters, digits and _ to texts or numbers; fix {shown(name)}"
            )
    return content, {str(name): str(value) for name, value in environment.items()}


def parse_pairs(words: Sequence[str], hints: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The pairs by key: `--key value`, `--key=value`, `--list a b`, and `--flag` for true."""
    found: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = aliases.get(name.replace("-", "_"), name.replace("-", "_"))
            if key not in hints:
                raise InputError(f"--{name} is not a known key; did you mean --{nearest(key, hints)}?")
            found[key] = [value] if equals else []
        elif key is None:
            # The value may be a secret that is meant for a key before it.
            raise InputError(f"{shown(word.partition('=')[0])} belongs to no key; write `--key value` pairs")
        else:
            found[key].append(word)
    for key, values in found.items():
        if not values and bool not in kinds(hints[key]):
            raise InputError(f"--{key} needs a value")
        if len(values) > 1 and not {list, tuple} & kinds(hints[key]):
            raise InputError(f"--{key} takes one value, got {len(values)}: quote it if it has spaces")
    return {key: values if len(values) > 1 else values[0] if values else True for key, values in found.items()}
