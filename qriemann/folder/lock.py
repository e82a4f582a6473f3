"""One run a folder: a lock file that says who holds it, released by the system when its process dies."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from qriemann.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".run.lock"
_held_descriptors: set[int] = set()


def _close_in_child() -> None:
    # A process forked from this one, such as a worker that loads data, would hold the lock for as long as it outlives it.
    for descriptor in _held_descriptors:
        os.close(descriptor)
    _held_descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; makes it, and removes it at the end if nothing was put into it.

    Raises:
        InputError: another run holds it, or it cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder / LOCK)
    except OSError as error:
        raise InputError(
            f"output_dir must be a writable folder, got {folder}: {error.strerror}; name another"
        ) from error
    _held_descriptors.add(descriptor)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it before finds out in `_acquire` that it is gone. Windows removes no
        # open file.
        _held_descriptors.discard(descriptor)
        if fcntl is None:
            os.close(descriptor)
        (folder / LOCK).unlink(missing_ok=True)
        if fcntl is not None:
            os.close(descriptor)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def refuse_if_held(folder: Path) -> None:
    """Raises InputError if a run holds the folder; writes nothing."""
    path = folder / LOCK
    if not path.exists():
        return
    _refuse_what_is_no_file(path)
    try:
        with path.open("rb") as file:
            if not _lock(file.fileno(), path):
                raise _held(folder, path)
    except OSError as error:
        raise InputError(
            f"output_dir must be a folder whose {LOCK} can be read, got {path}: {error.strerror}"
        ) from error


def _refuse_what_is_no_file(path: Path) -> None:
    # Whoever opens a pipe waits for its other end.
    if path.exists() and not path.is_file():
        raise InputError(f"{LOCK} must be a file that a run has made, got something else at {path}; remove it")


def _acquire(path: Path) -> int:
    _refuse_what_is_no_file(path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(descriptor, path):
            os.close(descriptor)
            raise _held(path.parent, path)
        # The holder before may have removed the file between the two calls; then the name is another file's by now.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    holder = {
        "pid": os.getpid(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
    }
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode())
    return descriptor


def _lock(descriptor: int, path: Path) -> bool:
    """Whether this process has the lock now."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            # Some network file systems have no locks; the process in the file has to do.
            return not _is_alive(_read(path))
        return True
    return not _is_alive(_read(path))


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote the file still runs; one of another host counts as running."""
    if holder.get("host") not in (None, platform.node()):
        return True
    try:
        began = psutil.Process(holder["pid"]).create_time()
        # A process that began after the file was written has only inherited the number.
        return began <= datetime.fromisoformat(holder["started_at"]).timestamp() + 1
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _held(folder: Path, path: Path) -> InputError:
    holder = _read(path)
    return InputError(
        f"output_dir must not be in use by another run, got {folder}, held by process {holder.get('pid', '?')} on "
        f"{holder.get('host', '?')} since {holder.get('started_at', '?')}; wait for it, or name another folder"
    )
