"""One value as a person writes it in YAML or on a command line, in the type that its key declares."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qriemann.folder.private import REDACTED, hide_credentials

# Names that end in "token" and are vocabulary entries, not credentials.
PUBLIC_TOKEN_KEYS = {"eos_token", "pad_token", "bos_token"}
# Characters of a value that a message repeats.
_SHOWN = 80
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_?key|credentials?)$", re.IGNORECASE)
_LAX = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)
_RULES = {
    "int": "an integer",
    "float": "a finite number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
}


def coerce(hint: Any, value: Any) -> Any:
    """The value in the declared type, by pydantic's lax rules; "8" is an integer, "yes" is true, one name is a list.

    Raises:
        ValueError: whose message is the rule ("an integer", "one of a, b"), to be put into a sentence by the caller.
    """
    kinds = [get_origin(member) or member for member in members(hint)]
    if isinstance(value, str) and dict in kinds and value.lstrip().startswith("{"):
        # yaml_file.py imports this file.
        from qriemann.config.yaml_file import read_value

        value = read_value(value, (dict,))
    if isinstance(value, str) and {list, tuple} & {*kinds} and str not in kinds:
        value = [value]
    try:
        # Python counts with truth values; nobody who writes `max_steps: true` does.
        if isinstance(value, bool) and not {bool, Literal, Any} & {*kinds}:
            return TypeAdapter(hint, config=_LAX).validate_python(object())
        return TypeAdapter(hint, config=_LAX).validate_python(value)
    except ValidationError as error:
        raise ValueError(_rule(error, hint)) from None


def members(hint: Any) -> list[Any]:
    """The types of a union, None left out; a plain type alone. Annotations are looked through."""
    if get_origin(hint) is Annotated:
        return members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [member for part in get_args(hint) for member in members(part) if part is not type(None)]
    return [hint]


def accepts_none(hint: Any) -> bool:
    """Whether null is a value of this type rather than a key left out."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that looks most like `word`."""
    candidates = list(known)
    return (difflib.get_close_matches(word[:_SHOWN], candidates, n=1, cutoff=0.0) or candidates)[0]


def redact(value: Any, key: str = "") -> Any:
    """A JSON-ready copy in which the value of every key that names a credential is replaced."""
    if value is not None and key not in PUBLIC_TOKEN_KEYS and _SECRET_KEY.search(key):
        return REDACTED
    if isinstance(value, dict):
        return {str(name): redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def shown(value: Any, key: str = "") -> str:
    """The value as a message may repeat it: one short line without credentials."""
    try:
        text = hide_credentials(repr(redact(value, key)))
    except ValueError:  # Python writes no integer of more than 4,300 digits.
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _rule(error: ValidationError, hint: Any) -> str:
    rules: dict[str, None] = {}
    for item in error.errors(include_url=False, include_input=False):
        kind = item["type"]
        if kind == "literal_error":
            choices = [str(choice) for member in members(hint) for choice in get_args(member)]
            rules[f"one of {', '.join(choices)}"] = None
            continue
        template = _RULES.get(kind) or _RULES.get(kind.partition("_")[0], "")
        rules[template.format(**item.get("ctx", {})) or item["msg"]] = None
    return " or ".join(rules)
