"""One run per folder: a lock that the system releases when its process dies, and a note beside it of who holds it."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from qriemann.errors import InputError
from qriemann.folder.contents import read_json

# Two files, because a locked file cannot be read on Windows.
LOCK, HOLDER = ".run.lock", ".run.holder"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds the folder for this process, but not for its forked workers (filelock 4.1 or newer).

    Makes the folder, and removes it at the end if nothing was put into it.

    Raises:
        InputError: another run holds it, or it cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _acquire(folder)
    holder = {
        "pid": os.getpid(),
        "host": platform.node(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        # The note is for a message alone; a disk that is full stops the run where its checkpoints are known.
        with suppress(OSError):
            (folder / HOLDER).write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        # While the lock is held: filelock notices that the file it has opened is gone, and tries again.
        for name in (HOLDER, LOCK):
            with suppress(OSError):
                (folder / name).unlink()
        lock.release()
        for path in made:
            with suppress(OSError):
                path.rmdir()


def refuse_if_held(folder: Path) -> None:
    """Raises InputError if a run holds the folder; writes nothing."""
    if (folder / LOCK).exists():
        _acquire(folder).release()


def _acquire(folder: Path) -> BaseFileLock:
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = read_json(folder / HOLDER)
        raise InputError(
            f"output_dir must not be in use by another run, got {folder}, held by process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')} since {holder.get('started_at', '?')}; wait for it, or name another folder"
        ) from None
    except OSError as error:
        raise InputError(f"output_dir must be a writable folder, got {folder}: {error.strerror}") from error
    return lock
