"""The singular values of what a saved LoRA adapter adds to each weight, from its factors alone.

Read and computed with numpy: whoever only looks at an adapter should not wait for torch and PEFT to be imported.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import deserialize

from qriemann.adapters.saved_config import CONFIG, check_config, value_for
from qriemann.errors import InputError

_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>[\w.-]+)\.lora_(?P<side>[AB])\.weight")
# bfloat16, which numpy lacks, is the upper half of a float32.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


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

    Raises:
        InputError: there is no plain LoRA adapter that can be read.
    """
    path = Path(path).expanduser()
    # Of one shape together: numpy loops over a batch in C.
    batches: dict[tuple[int, ...], list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for name, b, a in _pickled(path) if path.name == _PICKLE else _factors(path):
        batches.setdefault((*b.shape, *a.shape), []).append((name, b, a))
    spectra = []
    for layers in batches.values():
        names, b_factors, a_factors = zip(*layers, strict=True)
        b, a = np.stack(b_factors), np.stack(a_factors)
        # LAPACK fails on what is not finite, and a report of a run that went wrong is wanted all the more.
        finite = np.isfinite(b).all((1, 2)) & np.isfinite(a).all((1, 2))
        sigma = factored_svd(np.where(finite[:, None, None], b, 0), np.where(finite[:, None, None], a, 0))[1]
        sigma[~finite] = np.nan
        spectra += [LayerSpectrum(name, values, a.shape[1]) for name, values in zip(names, sigma.tolist(), strict=True)]
    # Layer 10 comes after layer 9.
    return sorted(spectra, key=lambda layer: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", layer.name)])


def _factors(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, scaling B and A of each layer, in float64."""
    config = check_config(folder, "inspect")
    if not (folder / _WEIGHTS).is_file():
        raise InputError(f"{folder / _WEIGHTS}: no such file; train or copy the adapter again")
    factors: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in _stored(folder / _WEIGHTS):
        match = _FACTOR.fullmatch(key)
        if match is not None and tensor.ndim == 2:
            factors.setdefault(match["module"], {})[match["side"]] = tensor.astype(np.float64)
        elif "lora_" in key and not key.endswith(".lora_B.bias"):
            raise InputError(
                f"an adapter must be plain LoRA on linear layers, got the tensor {key!r:.80} of {tensor.shape} in {folder}; "
                "merge it with the tool that trained it"
            )
    if not factors:
        raise InputError(f"an adapter must have a LoRA layer, got none in {folder}; check the folder")
    for name, pair in factors.items():
        rank = value_for(config.get("rank_pattern"), name, config["r"])
        if pair.keys() != {"A", "B"} or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            raise InputError(
                f"{name} must have factors B (m x r) and A (r x n) of the rank r = {rank} that {CONFIG} says, got "
                f"{ {side: factor.shape for side, factor in sorted(pair.items())} } in {folder}; copy or train it again"
            )
        alpha = value_for(config.get("alpha_pattern"), name, config["lora_alpha"])
        yield name, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * pair["B"], pair["A"]


def _stored(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a safetensors file; bfloat16 as float32."""
    try:
        tensors: list[tuple[str, dict[str, Any]]] = deserialize(path.read_bytes())
    except Exception as error:  # safetensors and the system each have their own
        raise InputError(f"{path} is not a whole safetensors file: {error}; copy or train it again") from error
    for key, entry in tensors:
        dtype = entry["dtype"]
        if dtype not in _DTYPES:
            raise InputError(
                f"{path} must hold {', '.join(_DTYPES)}, got {key!r:.80} as {dtype}; copy or train it again"
            )
        array = np.frombuffer(entry["data"], _DTYPES[dtype]).reshape(entry["shape"])
        yield key, (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


def _pickled(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    # Only torch reads a pickle, by an unpickler that makes tensors and nothing else.
    from qriemann.adapters.saved import read_adapter

    for name, layer in read_adapter(path, "inspect").layers.items():
        yield name, layer.scaling * layer.b.double().numpy(), layer.a.double().numpy()
