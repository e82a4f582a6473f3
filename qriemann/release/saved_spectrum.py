"""The singular values of what a LoRA adapter adds to each weight, from its factors alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

_A_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_A\.weight")


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's change.

    Attributes:
        module: the layer's name in the base.
        values: its singular values, largest first.
    """

    module: str
    values: list[float]

    @property
    def kind(self) -> str:
        """The last part of the name: layers that have it in common are compared."""
        return self.module.rpartition(".")[2]

    @property
    def effective_rank(self) -> float:
        """See `effective_rank`."""
        return effective_rank(self.values)


def effective_rank(values: list[float]) -> float:
    """exp of the entropy of the normalized singular values: r for r equal ones, 0 for none above zero.

    [Roy and Vetterli, "The effective rank", EUSIPCO 2007]
    """
    total = sum(values)
    shares = [value / total for value in values if value > 0] if total else []
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0


def read_spectrum(folder: Path, config: dict[str, Any]) -> list[LayerSpectrum]:
    """The spectrum of every layer of the adapter; empty if the folder has no plain LoRA weights that can be read.

    Args:
        folder: with `adapter_model.safetensors`.
        config: `adapter_config.json`.

    Cost: O((m + n) r^2) a layer; no m x n matrix is formed.
    """
    spectra = []
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
            names = set(tensors.keys())
            for name in sorted(names):
                match, partner = _A_FACTOR.fullmatch(name), name.replace("lora_A", "lora_B")
                if match is None or partner not in names:
                    continue
                a, b = tensors.get_tensor(name).float(), tensors.get_tensor(partner).float()
                if a.ndim == 2 and b.ndim == 2:
                    scaling = _scaling(config, match["module"], a.shape[0])
                    spectra.append(LayerSpectrum(match["module"], _singular_values(scaling * b, a)))
    except (OSError, SafetensorError):
        return []
    # Layer 10 comes after layer 9.
    return sorted(spectra, key=lambda layer: [int(part) if part.isdigit() else -1 for part in layer.module.split(".")])


def _singular_values(b: Float[Tensor, "m r"], a: Float[Tensor, "r n"]) -> list[float]:
    # LAPACK raises on what is not finite, and a report of a run that went wrong is wanted all the more.
    if not (b.isfinite().all() and a.isfinite().all()):
        return [math.nan] * a.shape[0]
    return torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT).tolist()


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    # PEFT matches the end of the module's name against the pattern.
    patterns = config.get("alpha_pattern") or {}
    own = next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), None)
    alpha = float(config.get("lora_alpha", rank) if own is None else own)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
