"""Values as people write them in YAML and on a command line, turned into the type that a dataclass field declares."""

import difflib
import json
import math
import re
import types
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from qriemann.folder.private import REDACTED, hide_credentials

_TRUE, _FALSE, _NONE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}, {"none", "null"}
# Names that end in "token" and are vocabulary entries or counters, not credentials.
PUBLIC_TOKEN_KEYS = {"eos_token", "pad_token", "bos_token"}
# What a message repeats of a value, in characters.
_SHOWN = 80
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_?key|credentials?)$", re.IGNORECASE)


def convert(hint: Any, value: Any, *, choices: Sequence[Any] | None = None) -> Any:
    """The value as the type that the field declares.

    Args:
        hint: the field's annotation; a union tries bool, int, float, list, mapping and str in this order.
        value: what YAML or the command line gave. None always stands for "not given".
        choices: the values that the field accepts, where it lists them.

    Raises:
        ValueError: whose message is the rule ("an integer", "one of ..."), to be put into a sentence by the caller.
    """
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None:
        return None
    # A string field may take the word itself: report_to: none.
    if isinstance(value, str) and value.lower() in _NONE and type(None) in members and str not in members:
        return None
    allowed = _allowed_values(members, choices)
    if allowed is not None:
        written = value.value if isinstance(value, Enum) else value
        if written not in allowed:
            raise ValueError(f"one of {', '.join(map(str, allowed))}")
        return written
    for member in sorted(members, key=_rank):
        # Where the word itself may be meant, only the plainest spelling is a truth value: `no` is one of this field's words.
        if member is bool and str in members and isinstance(value, str) and value.lower() not in ("true", "false"):
            continue
        if member is not str and get_origin(member) is list and str in members and isinstance(value, str):
            continue
        try:
            return _convert_one(member, value)
        except (ValueError, TypeError, OverflowError, RecursionError):
            continue
    names = [name for member in sorted(members, key=_rank) if (name := _rule(member))]
    raise ValueError(" or ".join(names) or "of the declared type")


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
    if isinstance(value, list | tuple | set):
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


def _allowed_values(members: Sequence[Any], choices: Sequence[Any] | None) -> list[Any] | None:
    if choices is not None:
        return list(choices)
    literals = [item for member in members if get_origin(member) is Literal for item in get_args(member)]
    enums = [
        item.value for member in members if isinstance(member, type) and issubclass(member, Enum) for item in member
    ]
    return literals or enums or None


_ORDER: list[Any] = [bool, int, float, list, dict, str]


def _rank(member: Any) -> int:
    base = get_origin(member) or member
    return _ORDER.index(base) if base in _ORDER else len(_ORDER)


def _rule(member: Any) -> str:
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a finite number",
        list: "a list",
        dict: "a mapping",
        str: "a string",
    }
    return names.get(get_origin(member) or member, "")


def _convert_one(member: Any, value: Any) -> Any:
    base = get_origin(member) or member
    if base is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
    elif base in (int, float) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4 as a string, because it wants 1.0e-4.
        number = float(value) if isinstance(value, int | float | str) else None
        if number is not None and base is float and math.isfinite(number):
            return number
        # A float of this size is a whole number too, and what counts in int64 fails on it later.
        if number is not None and base is int and number.is_integer() and abs(number) < 2**63:
            return int(value) if isinstance(value, int) else int(number)
    elif base is list and isinstance(value, list | tuple | str):
        items = [value] if isinstance(value, str) else list(value)
        (item_hint,) = get_args(member) or (Any,)
        return [convert(item_hint, item) if item_hint is not Any else item for item in items]
    elif base is dict:
        loaded = json.loads(value) if isinstance(value, str) else value
        if isinstance(loaded, dict):
            return loaded
    elif base is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    elif base not in _ORDER and base is not type(None):
        return value
    raise ValueError
