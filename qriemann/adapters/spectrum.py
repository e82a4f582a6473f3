"""The singular values of what a saved LoRA adapter adds to each weight, from its factors alone."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qriemann.adapters.saved_config import check_config
from qriemann.adapters.saved_tensors import adapter_folder, read_content


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's change D of its weight W.

    Attributes:
        sigma: singular values of D, largest first; NaN where the factors are not finite.
        relative_norm: ||D|| / ||W|| in the Frobenius norm; None without the base.
    """

    name: str
    sigma: list[float]
    rank: int
    relative_norm: float | None = None

    @property
    def norm(self) -> float:
        """||D|| in the Frobenius norm."""
        return math.hypot(*self.sigma)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalized singular values: r for r equal ones, 0 for none above zero.

        [Roy and Vetterli, "The effective rank", EUSIPCO 2007]
        """
        total = sum(self.sigma)
        shares = [value / total for value in self.sigma if value > 0] if total else []
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0

    @property
    def kind(self) -> str:
        """The layer's name in its block, such as `q_proj`."""
        return self.name.rpartition(".")[2]


def factored_svd(
    b: Float[Tensor, "*k m r"], a: Float[Tensor, "*k r n"]
) -> tuple[Float[Tensor, "*k m r"], Float[Tensor, "*k r"], Float[Tensor, "*k n r"]]:
    """U, sigma and V of the product B A in float64, from the r x r core between two QR factorizations.

    Cost: O((m + n) r^2) a layer; B A itself is never formed.
    """
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b.double()), torch.linalg.qr(a.mT.double())
    left, sigma, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ left, sigma, q_a @ right.mT


def group_by_kind(spectra: list[LayerSpectrum]) -> dict[str, list[LayerSpectrum]]:
    """The layers of each kind, in the model's order."""
    kinds: dict[str, list[LayerSpectrum]] = {}
    for spectrum in spectra:
        kinds.setdefault(spectrum.kind, []).append(spectrum)
    return kinds


def read_spectra(path: str | os.PathLike[str]) -> list[LayerSpectrum]:
    """The spectrum of every layer of a saved adapter, in the model's order; NaN where factors are not finite."""
    path = Path(path).expanduser()
    content = read_content(path, check_config(adapter_folder(path), "inspect"), finite=False)
    spectra = []
    for name, layer in content.layers.items():
        # LAPACK fails on numbers that are not finite, and a failed run needs its report most.
        finite = bool(layer.b.isfinite().all() and layer.a.isfinite().all())
        rank = layer.a.shape[0]
        sigma = (layer.scaling * factored_svd(layer.b, layer.a)[1]).tolist() if finite else [math.nan] * rank
        spectra.append(LayerSpectrum(name, sigma, rank))
    # Layer 10 comes after layer 9.
    return sorted(spectra, key=lambda layer: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", layer.name)])
