"""The singular values of what a saved LoRA adapter adds to each weight, from its factors alone.

Read and computed with numpy: whoever only looks at an adapter should not wait for torch and PEFT to be imported.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from qriemann.adapters.saved_config import check_config
from qriemann.adapters.saved_tensors import adapter_folder, read_content


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's change D of its weight W.

    Attributes:
        name: of the layer in the base.
        sigma: singular values of D, largest first; NaN where the factors are not finite.
        rank: of the factors.
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
    b: Float[np.ndarray, "*k m r"], a: Float[np.ndarray, "*k r n"]
) -> tuple[Float[np.ndarray, "*k m r"], Float[np.ndarray, "*k r"], Float[np.ndarray, "*k n r"]]:
    """U, sigma and V of the product B A, from the r x r core between two QR factorizations.

    Cost: O((m + n) r^2) a layer; B A itself is never formed.
    """
    (q_b, r_b), (q_a, r_a) = _tall_qr(b), _tall_qr(a.swapaxes(-1, -2))
    left, sigma, right = np.linalg.svd(r_b @ r_a.swapaxes(-1, -2), full_matrices=False)
    return q_b @ left, sigma, q_a @ right.swapaxes(-1, -2)


def _tall_qr(x: Float[np.ndarray, "*k m r"]) -> tuple[Float[np.ndarray, "*k m q"], Float[np.ndarray, "*k q r"]]:
    """QR of blocks of rows, then of their R factors. [Demmel et al., SIAM J. Sci. Comput. 34, 2012]"""
    # From 2^13 numbers on OpenBLAS wakes its threads, which wait for each other longer than they compute: 4.2 s of
    # processor time for 210 layers of rank 16, against 0.2 s in blocks.
    *batch, m, r = x.shape
    rows = max(2**13 // r, 2 * r)
    if m <= rows:
        return np.linalg.qr(x)
    count = -(-m // rows)
    padded = np.zeros((*batch, count * rows, r), x.dtype)
    padded[..., :m, :] = x
    q_blocks, r_blocks = np.linalg.qr(padded.reshape(*batch, count, rows, r))
    q, r_factor = _tall_qr(r_blocks.reshape(*batch, count * r, r))
    return (q_blocks @ q.reshape(*batch, count, r, r)).reshape(padded.shape)[..., :m, :], r_factor


def group_by_kind(spectra: list[LayerSpectrum]) -> dict[str, list[LayerSpectrum]]:
    """The layers of each kind, in the model's order."""
    kinds: dict[str, list[LayerSpectrum]] = {}
    for spectrum in spectra:
        kinds.setdefault(spectrum.kind, []).append(spectrum)
    return kinds


def read_spectra(path: str | os.PathLike[str]) -> list[LayerSpectrum]:
    """The spectrum of every layer of the plain LoRA adapter in a folder, in the model's order.

    Args:
        path: as `read_adapter` takes it. Factors that are not finite are not refused: their layer's values are NaN.
    """
    path = Path(path).expanduser()
    content = read_content(path, check_config(adapter_folder(path), "inspect"), finite=False)
    # Of one shape together: numpy loops over a batch in C.
    batches: dict[tuple[int, ...], list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for name, layer in content.layers.items():
        factors = layer.scaling * layer.b.astype(np.float64), layer.a.astype(np.float64)
        batches.setdefault((*layer.b.shape, *layer.a.shape), []).append((name, *factors))
    spectra = []
    for layers in batches.values():
        names, b_factors, a_factors = zip(*layers, strict=True)
        b, a = np.stack(b_factors), np.stack(a_factors)
        # LAPACK fails on numbers that are not finite, and a failed run needs its report most.
        finite = np.isfinite(b).all((1, 2)) & np.isfinite(a).all((1, 2))
        sigma = factored_svd(np.where(finite[:, None, None], b, 0), np.where(finite[:, None, None], a, 0))[1]
        sigma[~finite] = np.nan
        spectra += [LayerSpectrum(name, values, a.shape[1]) for name, values in zip(names, sigma.tolist(), strict=True)]
    # Layer 10 comes after layer 9.
    return sorted(spectra, key=lambda layer: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", layer.name)])
