"""An output folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from qriemann.errors import InputError
from qriemann.folder.files import open_like_its_folder


def check_output(out: Path) -> None:
    """Raises InputError unless the folder can be made or is empty, and nothing of an earlier try is beside it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise InputError(f"{out} {what}; the output must be an empty or new folder")
    for suffix in ("partial", "rejected"):
        left = out.with_name(f"{out.name}.{suffix}")
        if left.exists():
            raise InputError(f"{left} is left of an earlier try; remove it")


@contextlib.contextmanager
def written_or_nothing(partial: Path) -> Iterator[None]:
    """Makes the folder, and removes it again if the block does not end well; a full disk becomes a sentence."""
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{partial} cannot be made: {error.strerror}; name another output") from error
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors wraps the system's error in one of its own.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise InputError(
                f"there is no room left on the disk of {partial.parent}; nothing was kept, name another output"
            ) from error
        raise


def move_into_place(partial: Path, folder: Path) -> None:
    """Renames in one move; an empty folder of that name gives way."""
    for path in partial.rglob("*"):
        if path.is_file():
            open_like_its_folder(path)
    if folder.is_dir():
        folder.rmdir()
    partial.rename(folder)
