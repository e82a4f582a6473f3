"""Keeps upstream's progress bars out of an output that is no terminal: each redraws itself with control characters."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from rich.console import Console
from transformers.utils import logging as hf_logging


@contextmanager
def no_bars_without_terminal(console: Console) -> Iterator[None]:
    """Hides the bars of `datasets` and transformers where the console is no terminal; those shown before are shown after."""
    libraries = (
        (datasets.is_progress_bar_enabled, datasets.disable_progress_bars, datasets.enable_progress_bars),
        (hf_logging.is_progress_bar_enabled, hf_logging.disable_progress_bar, hf_logging.enable_progress_bar),
    )
    hidden = [] if console.is_terminal else [library for library in libraries if library[0]()]
    for _, disable, _ in hidden:
        disable()
    try:
        yield
    finally:
        for _, _, enable in hidden:
            enable()
