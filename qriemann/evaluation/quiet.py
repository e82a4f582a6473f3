"""Keeps upstream's progress bars and warnings out of an output that a person or a log reads."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.std import tqdm


@contextmanager
def quiet() -> Iterator[None]:
    """Hides progress bars where stderr is no terminal, and the warnings that nobody can act on."""
    draw = tqdm.__init__

    @functools.wraps(draw)
    def hidden(self: Any, *args: Any, **options: Any) -> None:
        draw(self, *args, **options | {"disable": True})

    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        # Trained biases are in the base itself; `Trained.untrained` puts the old ones back.
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers", category=UserWarning)
        tqdm.__init__ = draw if sys.stderr.isatty() else hidden  # type: ignore[method-assign]
        try:
            yield
        finally:
            tqdm.__init__ = draw  # type: ignore[method-assign]
