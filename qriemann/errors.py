"""The errors a user can mend: one line that says what must hold, what was found, where, and the remedy.

The command line prints them without a traceback and exits with status 2; everything else is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """A value, file, model or dataset that the user named cannot be used as it is."""


class MissingExtraError(InputError, ImportError):
    """An optional dependency is not installed; the message names the `pip install` that brings it."""


class ShortMemoryError(InputError):
    """An allocation failed: the GPU or the machine has too little memory for what was asked."""
