"""One value as a person writes it in YAML or on a command line, in the type that its key declares."""

import difflib
import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from qriemann.folder.private import hide_credentials, redact

# Characters of a value that a message repeats.
_SHOWN = 80
_LAX = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)
# pydantic's name of an error, and the rule as a sentence has it.
_RULES = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a finite number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int": "an integer",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list": "a list",
    "literal_error": "one of {expected}",
    "string": "a string",
    "tuple": "a list",
}
_WORD, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


class Loader(yaml.SafeLoader):
    """Top-level scalars stay strings, which `coerce` converts by their key's type, as it does those of the command line.

    Inside a value no type says what a word is. There YAML 1.1 decides, as in TRL, except that 1e-4 is a number. A repeated
    key is an error.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        of_file = not node.flow_style and not node.start_mark.column
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in names:
                raise yaml.MarkedYAMLError(problem=f"{shown(key.value)} a second time", problem_mark=key.start_mark)
            names.add(str(key.value))
            if of_file and isinstance(value, yaml.ScalarNode) and value.tag != _NULL:
                value.tag = _WORD
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(?i:inf)|\.(?i:nan))$", re.ASCII
    ),
    list("-+.0123456789"),
)


def coerce(hint: Any, value: Any) -> Any:
    """The value in the declared type, by pydantic's lax rules; "8" is an integer, "yes" is true, one name is a list.

    Raises:
        ValueError: whose message is the rule ("an integer", "one of a, b"), to be put into a sentence by the caller.
    """
    types_ = kinds(hint)
    if isinstance(value, str):
        if value.lower() in ("none", "null") and accepts_none(hint) and str not in types_:
            return None
        is_mapping = dict in types_ and value.lstrip().startswith("{")
        if {bool, int, float, Any} & types_ or {Literal, str} <= types_ or is_mapping:
            read = _as_yaml(value)
            # "no" and its like are words where the key takes words.
            is_word = isinstance(read, bool) and str in types_ and value.lower() not in ("true", "false")
            value = value if is_word else read
        if isinstance(value, str) and {list, tuple} & types_ and str not in types_:
            value = [value]
    # Python counts with truth values; nobody who writes `max_steps: true` does.
    refused = isinstance(value, bool) and not {bool, Literal, Any} & types_
    try:
        return TypeAdapter(hint, config=_LAX).validate_python(object() if refused else value)
    except ValidationError as error:
        rules = dict.fromkeys(map(_rule, error.errors(include_url=False, include_input=False)))
        raise ValueError(" or ".join(rules)) from None


def kinds(hint: Any) -> set[Any]:
    """The types of a union without their arguments, None left out; of a plain type itself. Annotations are looked through."""
    if get_origin(hint) is Annotated:
        return kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return {kind for part in get_args(hint) for kind in kinds(part)} - {type(None)}
    return {get_origin(hint) or hint}


def accepts_none(hint: Any) -> bool:
    """Whether null is a value of this type rather than a key left out."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that looks most like `word`."""
    candidates = list(known)
    return (difflib.get_close_matches(word[:_SHOWN], candidates, n=1, cutoff=0.0) or candidates)[0]


def shown(value: Any, key: str = "") -> str:
    """The value as a message may repeat it: one short line without credentials."""
    try:
        text = hide_credentials(repr(redact(value, key)))
    except ValueError:  # Python writes no integer of more than 4,300 digits.
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _as_yaml(text: str) -> Any:
    """The truth value, number or mapping that the file would read; otherwise the text itself."""
    try:
        value = yaml.load(text, Loader)
    # Its conversions raise whatever they like: KeyError for `!!bool foo`, ValueError for a number of 5,000 digits.
    except Exception:
        return text
    return value if isinstance(value, bool | int | float | dict) else text


def _rule(error: Any) -> str:
    kind, given = error["type"], dict(error.get("ctx", {}))
    given["expected"] = str(given.get("expected", "")).replace("'", "").replace(" or ", ", ")
    template = _RULES.get(kind) or _RULES.get(kind.partition("_")[0]) or error["msg"]
    return "a finite number" if kind == "finite_number" else template.format(**given)
