"""The keys of TRL's `SFTConfig` with their types, read from the source of the installed version.

Importing TRL imports torch, which takes seconds; a typing error in a YAML file should be answered at once.
"""

import ast
import functools
import importlib.util
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qriemann.errors import InputError

_SOURCES = (
    ("transformers", "trainer_utils.py"),
    ("transformers", "training_args.py"),
    ("trl", "trainer/base_config.py"),
    ("trl", "trainer/sft_config.py"),
)
_DATACLASSES = ("TrainingArguments", "_BaseConfig", "SFTConfig")


@functools.cache
def trl_hints() -> dict[str, Any]:
    """The type of every field of `SFTConfig`, by name. Enumerations become the literals of their values."""
    names: dict[str, Any] = {"Any": Any, "Literal": Literal}
    hints: dict[str, Any] = {}
    for definition in _classes():
        bases = {ast.unparse(base).rpartition(".")[2] for base in definition.bases}
        if bases & {"ExplicitEnum", "StrEnum"}:
            values = [text for node in definition.body if (text := _text(node)) is not None]
            names[definition.name] = Literal[tuple(values)]  # type: ignore[valid-type]
        elif definition.name in _DATACLASSES:
            for node in definition.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    hints[node.target.id] = _hint(node.annotation, names)
    return hints


def _classes() -> Iterator[ast.ClassDef]:
    for package, file in _SOURCES:
        # Of a package at the top, the search imports nothing.
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"the package {package} is not installed; pip install {package}")
        tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
        yield from (node for node in tree.body if isinstance(node, ast.ClassDef))


def _hint(annotation: ast.expr, names: dict[str, Any]) -> Any:
    """The annotation as a type; `Enumeration | str` is the enumeration, and a class not known here takes anything."""
    if isinstance(annotation, ast.BinOp):
        parts = [_hint(part, names) for part in (annotation.left, annotation.right)]
        if any(typing.get_origin(part) is Literal and None not in typing.get_args(part) for part in parts):
            parts = [part for part in parts if part is not str]
        return Any if Any in parts else typing.Union[tuple(parts)]  # noqa: UP007 - made at run time
    try:
        return eval(ast.unparse(annotation), {}, names)
    except NameError:
        return Any


def _text(node: ast.stmt) -> str | None:
    """What a class assigns a name, if that is a string."""
    value = node.value.value if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) else None
    return value if isinstance(value, str) else None
