"""Keeps upstream's progress bars and warnings out of an output that a person or a log reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from qriemann.base.bars import no_bars_without_terminal


@contextmanager
def quiet_upstream(console: Console) -> Iterator[None]:
    """Hides warnings that nobody can act on and, where there is no terminal, the bars of `datasets` and transformers."""
    with no_bars_without_terminal(console), warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        # Trained biases are in the base itself; `Trained.untrained` puts the old ones back.
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers", category=UserWarning)
        yield
