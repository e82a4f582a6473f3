"""An output folder that exists whole or not at all, and the result that `merge` and `export` return."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qriemann.errors import InputError
from qriemann.evaluation.proof import Verdict
from qriemann.folder.files import open_like_its_folder


@dataclass(frozen=True)
class Released:
    """What `merge` or `export` left behind.

    Attributes:
        folder: the model, with a subfolder for each base if there are several, or the adapter; ends in `.rejected` if the
            proof failed.
        report: the content of `merge_report.json` or `export_report.json`.
    """

    folder: Path
    accepted: bool
    verdicts: list[Verdict]
    report: dict[str, Any]


@contextlib.contextmanager
def written_or_nothing(out: Path) -> Iterator[Path]:
    """Makes the folder OUT.partial, and removes it again if the block does not end well; a full disk becomes a sentence."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{partial} cannot be made: {error.strerror}; name another output") from error
    try:
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors wraps the system's error in one of its own.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise InputError(f"the disk of {partial.parent} is full; nothing was kept, name another output") from error
        raise


def move_into_place(partial: Path, out: Path, *, accepted: bool) -> Path:
    """Renames the folder in one move, to OUT or OUT.rejected, and returns its path; an empty folder OUT is replaced."""
    folder = out if accepted else out.with_name(f"{out.name}.rejected")
    for path in partial.rglob("*"):
        if path.is_file():
            open_like_its_folder(path)
    if folder.is_dir():
        folder.rmdir()
    return partial.rename(folder)
