"""The errors a user can fix: one line that says what must hold, what was found, where, and the remedy.

The command line prints them without a traceback and exits with status 2; everything else is a bug and keeps its traceback.
"""

from collections.abc import Iterable


class InputError(ValueError):
    """A value, file, model or dataset that the user named cannot be used as it is."""


class MissingExtraError(InputError, ImportError):
    """An optional dependency is not installed; the message names the `pip install` that brings it."""


class ShortMemoryError(InputError):
    """An allocation failed: the GPU or the machine has too little memory for what was asked."""


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}".removesuffix(": ")


def listed(items: Iterable[object], most: int = 3) -> str:
    """The items with commas between, those beyond the first few as a number."""
    words = [str(item) for item in items]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def causes(error: BaseException) -> list[BaseException]:
    """The error and what led to it, the innermost last."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found
