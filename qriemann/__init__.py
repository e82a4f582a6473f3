"""Fine-tunes 4-bit chat models on one GPU, with the adapter on the manifold of fixed-rank matrices.

The public names load on first use, so that `import qriemann` needs nothing but Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qriemann.adapters.attach import attach
    from qriemann.adapters.base import load_base
    from qriemann.errors import InputError, MissingExtraError
    from qriemann.optim.riemannion import Riemannion
    from qriemann.training.run import train
    from qriemann.training.seam import FixedRankCallback, for_trainer

__version__ = "0.1.0"

_HOME = {
    "FixedRankCallback": "qriemann.training.seam",
    "InputError": "qriemann.errors",
    "MissingExtraError": "qriemann.errors",
    "Riemannion": "qriemann.optim.riemannion",
    "attach": "qriemann.adapters.attach",
    "for_trainer": "qriemann.training.seam",
    "load_base": "qriemann.adapters.base",
    "train": "qriemann.training.run",
}

__all__ = [
    "FixedRankCallback",
    "InputError",
    "MissingExtraError",
    "Riemannion",
    "attach",
    "for_trainer",
    "load_base",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qriemann' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
