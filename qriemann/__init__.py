"""Fine-tunes 4-bit chat models on one GPU, with the adapter on the manifold of fixed-rank matrices.

The public names load on first use, so that `import qriemann` needs nothing but Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qriemann.adapters.attach import attach as attach
    from qriemann.adapters.attach import load_base as load_base
    from qriemann.adapters.attach import truncate_ as truncate_
    from qriemann.adapters.detach import detach as detach
    from qriemann.adapters.loi import locally_optimal_ as locally_optimal_
    from qriemann.checkpoints.manifest import newest_checkpoint as newest_checkpoint
    from qriemann.checkpoints.protect import protect as protect
    from qriemann.config import Settings as Settings
    from qriemann.config import load_settings as load_settings
    from qriemann.config import settings_from as settings_from
    from qriemann.errors import InputError as InputError
    from qriemann.errors import MissingExtraError as MissingExtraError
    from qriemann.evaluation.evaluate import evaluate as evaluate
    from qriemann.memory.plan import plan as plan
    from qriemann.optim.riemannion import Riemannion as Riemannion
    from qriemann.optim.riemannlora import RiemannLoRA as RiemannLoRA
    from qriemann.optim.scaled import ScaledAdamW as ScaledAdamW
    from qriemann.optim.scaled import ScaledGD as ScaledGD
    from qriemann.release.export import export as export
    from qriemann.release.export_gguf import export_gguf as export_gguf
    from qriemann.release.inspect import inspect as inspect
    from qriemann.release.merge import merge as merge
    from qriemann.release.push import push as push
    from qriemann.release.report import write_report as write_report
    from qriemann.training.check import check as check
    from qriemann.training.loi_callback import LocallyOptimalInit as LocallyOptimalInit
    from qriemann.training.prepare import prepare as prepare
    from qriemann.training.rate_callback import MeasuredRate as MeasuredRate
    from qriemann.training.seam import FixedRankCallback as FixedRankCallback
    from qriemann.training.seam import for_trainer as for_trainer
    from qriemann.training.train import train as train

__version__ = "0.1.0"

_MODULES = {
    "adapters.attach": "attach load_base truncate_",
    "adapters.detach": "detach",
    "adapters.loi": "locally_optimal_",
    "checkpoints.manifest": "newest_checkpoint",
    "checkpoints.protect": "protect",
    "config": "Settings load_settings settings_from",
    "errors": "InputError MissingExtraError",
    "evaluation.evaluate": "evaluate",
    "memory.plan": "plan",
    "optim.riemannion": "Riemannion",
    "optim.riemannlora": "RiemannLoRA",
    "optim.scaled": "ScaledAdamW ScaledGD",
    "release.export": "export",
    "release.export_gguf": "export_gguf",
    "release.inspect": "inspect",
    "release.merge": "merge",
    "release.push": "push",
    "release.report": "write_report",
    "training.check": "check",
    "training.loi_callback": "LocallyOptimalInit",
    "training.prepare": "prepare",
    "training.rate_callback": "MeasuredRate",
    "training.seam": "FixedRankCallback for_trainer",
    "training.train": "train",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qriemann' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qriemann.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
