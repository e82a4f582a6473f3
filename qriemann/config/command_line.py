"""`--key value` pairs of a command line, as the YAML file would have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_origin

from qriemann.config.values import accepts_none, members, nearest, shown
from qriemann.config.yaml_file import read_value
from qriemann.errors import InputError


def parse_pairs(words: Sequence[str], hints: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The pairs by key: `--key value`, `--key=value`, `--list a b`, and `--flag` for true.

    Args:
        words: what followed the file on the command line.
        hints: the type of every known key.
        aliases: the key that another name stands for.

    Raises:
        InputError: a word that belongs to no key, an unknown key, or a key without its value.
    """
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
    return {key: _value(key, values, hints[key]) for key, values in found.items()}


def _value(key: str, values: list[str], hint: Any) -> Any:
    kinds = [get_origin(member) or member for member in members(hint)]
    if not values:
        if bool in kinds:
            return True
        raise InputError(f"--{key} needs a value")
    if len(values) > 1:
        if not {list, tuple} & {*kinds}:
            raise InputError(f"--{key} takes one value, got {len(values)}: quote it if it has spaces")
        return values
    (value,) = values
    if value.lower() in ("none", "null") and accepts_none(hint) and str not in kinds:
        return None
    return read_value(value, (bool, int, float)) if {bool, int, float} & {*kinds} else value
