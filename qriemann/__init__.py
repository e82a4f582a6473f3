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

_HOME = {
    "FixedRankCallback": "training.seam",
    "InputError": "errors",
    "LocallyOptimalInit": "training.loi_callback",
    "MeasuredRate": "training.rate_callback",
    "MissingExtraError": "errors",
    "RiemannLoRA": "optim.riemannlora",
    "Riemannion": "optim.riemannion",
    "ScaledAdamW": "optim.scaled",
    "ScaledGD": "optim.scaled",
    "Settings": "config",
    "attach": "adapters.attach",
    "check": "training.check",
    "detach": "adapters.detach",
    "evaluate": "evaluation.evaluate",
    "export": "release.export",
    "export_gguf": "release.export_gguf",
    "for_trainer": "training.seam",
    "inspect": "release.inspect",
    "load_base": "adapters.attach",
    "load_settings": "config",
    "locally_optimal_": "adapters.loi",
    "merge": "release.merge",
    "newest_checkpoint": "checkpoints.manifest",
    "plan": "memory.plan",
    "prepare": "training.prepare",
    "protect": "checkpoints.protect",
    "push": "release.push",
    "settings_from": "config",
    "train": "training.train",
    "truncate_": "adapters.attach",
    "write_report": "release.report",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qriemann' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qriemann.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
