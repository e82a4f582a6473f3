"""Fine-tunes 4-bit chat models on one GPU, with the adapter on the manifold of fixed-rank matrices.

The public names load on first use, so that `import qriemann` needs nothing but Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qriemann.adapters.attach import attach, truncate_
    from qriemann.adapters.loi import locally_optimal_
    from qriemann.base.load import load_base
    from qriemann.checkpoints.manifest import newest_checkpoint
    from qriemann.checkpoints.protect import protect
    from qriemann.errors import InputError, MissingExtraError
    from qriemann.evaluation.evaluate import evaluate
    from qriemann.optim.riemannion import Riemannion
    from qriemann.optim.riemannlora import RiemannLoRA
    from qriemann.optim.scaled import ScaledAdamW, ScaledGD
    from qriemann.release.export import export
    from qriemann.release.inspect import inspect
    from qriemann.release.merge import merge
    from qriemann.release.push import push
    from qriemann.release.report import write_report
    from qriemann.training.loi_callback import LocallyOptimalInit
    from qriemann.training.run import train
    from qriemann.training.seam import FixedRankCallback, for_trainer

__version__ = "0.1.0"

_HOME = {
    "FixedRankCallback": "qriemann.training.seam",
    "InputError": "qriemann.errors",
    "LocallyOptimalInit": "qriemann.training.loi_callback",
    "MissingExtraError": "qriemann.errors",
    "RiemannLoRA": "qriemann.optim.riemannlora",
    "Riemannion": "qriemann.optim.riemannion",
    "ScaledAdamW": "qriemann.optim.scaled",
    "ScaledGD": "qriemann.optim.scaled",
    "attach": "qriemann.adapters.attach",
    "evaluate": "qriemann.evaluation.evaluate",
    "export": "qriemann.release.export",
    "for_trainer": "qriemann.training.seam",
    "inspect": "qriemann.release.inspect",
    "load_base": "qriemann.base.load",
    "locally_optimal_": "qriemann.adapters.loi",
    "merge": "qriemann.release.merge",
    "newest_checkpoint": "qriemann.checkpoints.manifest",
    "protect": "qriemann.checkpoints.protect",
    "push": "qriemann.release.push",
    "train": "qriemann.training.run",
    "truncate_": "qriemann.adapters.attach",
    "write_report": "qriemann.release.report",
}

__all__ = [
    "FixedRankCallback",
    "InputError",
    "LocallyOptimalInit",
    "MissingExtraError",
    "RiemannLoRA",
    "Riemannion",
    "ScaledAdamW",
    "ScaledGD",
    "attach",
    "evaluate",
    "export",
    "for_trainer",
    "inspect",
    "load_base",
    "locally_optimal_",
    "merge",
    "newest_checkpoint",
    "protect",
    "push",
    "train",
    "truncate_",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qriemann' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
