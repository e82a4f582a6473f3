"""Keeps upstream's progress bars and warnings out of an output that a person or a log reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from rich.console import Console
from transformers.utils import logging as hf_logging


@contextmanager
def quiet_upstream(console: Console) -> Iterator[None]:
    """Hides warnings that nobody can act on and, where there is no terminal, the bars of `datasets` and transformers."""
    libraries = (
        (datasets.is_progress_bar_enabled, datasets.disable_progress_bars, datasets.enable_progress_bars),
        (hf_logging.is_progress_bar_enabled, hf_logging.disable_progress_bar, hf_logging.enable_progress_bar),
    )
    hidden = [] if console.is_terminal else [library for library in libraries if library[0]()]
    for _, disable, _ in hidden:
        disable()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
            warnings.filterwarnings(
                "ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning
            )
            # Trained biases are in the base itself; `Trained.untrained` puts the old ones back.
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers", category=UserWarning)
            yield
    finally:
        for _, _, enable in hidden:
            enable()
