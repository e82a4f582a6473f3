"""Files that are whole and on disk before anything relies on them, and paths that stay in their folder."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qriemann.errors import InputError

#: The endings of files that hold rows; `data/row_files.py` has a reader for each.
ROW_FILES = (".jsonl", ".json", ".csv", ".parquet")

_LEAVES_FOLDER = re.compile(r"[/~]|\\\\|[A-Za-z]:[\\/]|\.\.\\|(.*/)?\.\.(/|$)", re.DOTALL)


def sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Replaces the file's content by the text; see `replace_file`."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Replaces the file in one move, flushed to disk: a crash leaves the old content or the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    sync(path.parent)


def check_exists(path: str, what: str) -> None:
    """Raises InputError unless there is something at the path; `what` says what for."""
    if not Path(path).expanduser().exists():
        raise InputError(f"{path}: no such file or folder ({what})")


def check_output(out: Path) -> None:
    """Raises InputError unless the folder can be made or is empty, and nothing of an earlier try is beside it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise InputError(f"{out} {what}; the output must be an empty or new folder")
    for suffix in ("partial", "rejected"):
        left = out.with_name(f"{out.name}.{suffix}")
        if left.exists():
            raise InputError(f"{left} is left of an earlier try; remove it")


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


def open_like_its_folder(path: Path) -> None:
    """Makes the file as readable as its folder; safetensors ignores the umask and lets only the owner read."""
    # File systems without modes refuse.
    with suppress(OSError):
        path.chmod(path.parent.stat().st_mode & 0o666)


def sync(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    if os.name == "nt":
        # Windows flushes through a writable handle, and has no handles of folders.
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
