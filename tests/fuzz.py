"""What every fuzzed reader is held to: our own error in one line, no long wait, nothing written outside of its folder."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qriemann.errors import InputError

# Seconds that one reading may take, on a clock that goes on while it waits; nothing here is longer than a few kB.
PATIENCE = 5.0
_FEW, _MANY = 60, 10_000

# Where a file is changed, as a share of its length, and into what; the beginning is where headers are.
damages = st.tuples(
    st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.0001, 0.001, 0.01]),
    st.binary(max_size=64),
    st.booleans(),
)


def damage(content: bytes, place: float, change: bytes, *, cut: bool) -> bytes:
    """The content with other bytes at a place, and with nothing after them if it is cut there."""
    at = int(place * len(content))
    return content[:at] + change + (b"" if cut else content[at + len(change) :])


def at_length(property_test: Callable, strategies: dict[str, Any]) -> tuple[Callable, Callable]:
    """The property on a few cases for every run, and on 10,000 by hand."""

    def made(cases: int) -> Callable:
        quiet: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
        # The few are the same in every run, so that a change is blamed for what it did; the many search.
        few = cases == _FEW
        return settings(max_examples=cases, derandomize=few, **quiet)(given(**strategies)(property_test))

    return made(_FEW), pytest.mark.soak(made(_MANY))


@contextmanager
def hostile_input(folder: Path) -> Iterator[None]:
    """Lets InputError of one line pass, and fails for any other, for a long wait, and for a change outside of the folder."""
    said = ""
    _changes.clear()
    _watched.append(True)
    before = signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    except InputError as error:
        said = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _watched.clear()
    assert "\n" not in said
    inside = str(folder.resolve())
    assert [path for path in _changes if not os.path.realpath(path).startswith(inside)] == []


class Hang(BaseException):
    """A reading that took too long; no reader's `except Exception` takes it for bad input."""


def _give_up(*_: Any) -> None:
    raise Hang(f"longer than {PATIENCE} s")


_watched: list[bool] = []
_changes: list[str] = []
_EVENTS = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _note_change(event: str, args: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event == "open" and isinstance(args[0], str | bytes) and (args[2] or 0) & _WRITING:
        path = os.fsdecode(args[0])
        _changes.extend([] if path == os.devnull else [path])
    elif event in _EVENTS:
        # What a symbolic link points to is only a name; relative ones may be meant from an open folder.
        paths = [os.fsdecode(arg) for arg in args[event == "os.symlink" :] if isinstance(arg, str | bytes)]
        opened = Path(f"/proc/self/fd/{args[-1]}")
        _changes.extend(str(opened.resolve() / path) if opened.exists() else path for path in paths)
    elif event in ("subprocess.Popen", "os.system", "socket.connect"):
        _changes.append(f"{event}{args[:1]}")


# Python has no way to take it out again, so it looks only where a reading is watched.
sys.addaudithook(_note_change)
