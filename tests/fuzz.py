"""What every fuzzed reader is held to: our own error in one line, no long wait, nothing written outside of its folder."""

from __future__ import annotations

import signal
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
    """Lets InputError of one line pass; fails for any other, for a long wait, and for a change beside the folder."""
    said, around = "", {path for path in folder.parent.iterdir() if path != folder}
    before = signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    except InputError as error:
        said = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "\n" not in said
    assert {path for path in folder.parent.iterdir() if path != folder} == around


class Hang(BaseException):
    """A reading that took too long; no reader's `except Exception` takes it for bad input."""


def _give_up(*_: Any) -> None:
    raise Hang(f"longer than {PATIENCE} s")
