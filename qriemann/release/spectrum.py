"""`inspect`: what an adapter does to each layer, from its factors alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qriemann.adapters.saved import LoraFactors, SavedAdapter, read_adapter
from qriemann.errors import InputError
from qriemann.evaluation.quiet import quiet_upstream
from qriemann.release.saved_spectrum import effective_rank
from qriemann.release.weights import original_weights, tensor_names

PLOT = "inspect.png"

# A layer is dead if it changes less than this share of what the middle layer does, and saturated if its effective rank is
# this share of its rank. Methods that orthogonalize their steps saturate every layer from the first step on.
_DEAD, _SATURATED = 1e-3, 0.9


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's change D of its weight W.

    Attributes:
        sigma: singular values of D, falling.
        rank: of the factors.
        relative_norm: ||D|| / ||W|| in the Frobenius norm; None without the base.
    """

    name: str
    sigma: list[float]
    rank: int
    relative_norm: float | None

    @property
    def norm(self) -> float:
        """||D|| in the Frobenius norm."""
        return math.hypot(*self.sigma)

    @property
    def effective_rank(self) -> float:
        """See `qriemann.release.saved_spectrum.effective_rank`."""
        return effective_rank(self.sigma)

    @property
    def kind(self) -> str:
        """The layer's name in its block, as `q_proj`."""
        return self.name.rpartition(".")[2]


def small_core(
    layer: LoraFactors,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "n r"]]:
    """The singular value decomposition of scaling B A in float64, from the r x r core between two QR factors."""
    q_b, r_b = torch.linalg.qr(layer.b.double())
    q_a, r_a = torch.linalg.qr(layer.a.double().mT)
    left, sigma, right = torch.linalg.svd(layer.scaling * r_b @ r_a.mT, full_matrices=False)
    return q_b @ left, sigma, q_a @ right.mT


def inspect(
    adapter: str | Path,
    *,
    base: str | None = None,
    plot: str | Path | None = None,
    every_layer: bool = False,
    console: Console | None = None,
) -> list[LayerSpectrum]:
    """The spectrum of every layer; prints a table and draws `inspect.png`.

    Args:
        adapter: a folder with a plain LoRA adapter.
        base: instead of the one that the adapter names. Where the base cannot be had, norms are not relative to it.
        plot: the picture; None for `inspect.png` in the adapter's folder.
        every_layer: a line for every layer instead of every kind.
        console: where the table is printed; None for nowhere.

    Raises:
        InputError: no plain LoRA adapter is there, or `base` is given and cannot be had or does not fit.
    """
    console = console or Console(quiet=True)
    saved = read_adapter(adapter)
    with quiet_upstream(console):
        norms = _base_norms(saved, base, console)
    spectra = []
    for name, layer in saved.layers.items():
        sigma = small_core(layer)[1].tolist()
        relative = math.hypot(*sigma) / norms[name] if name in norms else None
        spectra.append(LayerSpectrum(name, sigma, layer.a.shape[0], relative))
    spectra.sort(
        key=lambda spectrum: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", spectrum.name)]
    )
    console.print(_table(spectra, every_layer=every_layer))
    for line in remarks(spectra):
        console.print(line, highlight=False)
    path = saved.folder / PLOT if plot is None else Path(plot)
    draw(spectra, path)
    console.print(f"drawn in {path}", highlight=False, soft_wrap=True)
    return spectra


def dead(spectra: list[LayerSpectrum]) -> list[str]:
    """Names of the layers that training left where they were."""
    middle = statistics.median(spectrum.norm for spectrum in spectra)
    return [spectrum.name for spectrum in spectra if spectrum.norm <= _DEAD * middle]


def saturated(spectra: list[LayerSpectrum]) -> list[str]:
    """Names of the layers that use every direction they have."""
    return [s.name for s in spectra if s.rank > 1 and s.effective_rank >= _SATURATED * s.rank]


def remarks(spectra: list[LayerSpectrum]) -> list[str]:
    """One sentence for each flag."""
    lines = []
    for names, what in (
        (dead(spectra), f"dead (below {_DEAD:g} of the middle layer's norm)"),
        (
            saturated(spectra),
            f"saturated (effective rank at least {_SATURATED:.0%} of the rank: usual after orthogonalized steps, as "
            "Riemannion's; after AdamW a sign that a higher rank may find more)",
        ),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{len(names)} of {len(spectra)} layers are {what}: {', '.join(names[:3])}{more}")
    return lines or ["no layer is dead, none is saturated"]


def draw(spectra: list[LayerSpectrum], path: Path) -> None:
    """Singular values of every layer, and norms along the depth, one colour a kind of layer."""
    # Figure alone draws with Agg; pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    values, depth = figure.subplots(1, 2)
    for number, (kind, members) in enumerate(_kinds(spectra).items()):
        color = f"C{number}"
        for index, spectrum in enumerate(members):
            values.plot(range(1, len(spectrum.sigma) + 1), spectrum.sigma, color=color, alpha=0.25, linewidth=0.8)
            if index == 0:
                values.plot([], [], color=color, label=kind)
        sizes = [s.norm if s.relative_norm is None else s.relative_norm for s in members]
        depth.plot(range(len(members)), sizes, color=color, marker=".", label=kind)
    values.set(xlabel="index", ylabel="singular value of the change", title="spectrum of every layer")
    relative = spectra[0].relative_norm is not None
    depth.set(
        xlabel="block",
        ylabel="norm of the change" + (" / norm of the weight" if relative else ""),
        title="along the depth",
    )
    # Zero has no place on a logarithmic axis; the layers that have only zeros are named in the table.
    if all(min(spectrum.sigma) > 0 for spectrum in spectra):
        values.set_yscale("log")
    for axes in (values, depth):
        axes.grid(visible=True, alpha=0.3)
    depth.set_ylim(bottom=0)
    values.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def _base_norms(saved: SavedAdapter, base: str | None, console: Console) -> dict[str, float]:
    """||W|| of every layer; empty, with a note, where the base cannot be had and was not asked for by name."""
    try:
        name = saved.base(base)
        weights: Mapping[str, Tensor] = original_weights(name, saved.config.revision if base is None else None)
        names = tensor_names(saved.layers, weights, "model")
        return {module: weights[tensor].float().norm().item() for module, tensor in names.items()}
    except InputError as error:
        if base is not None:
            raise
        console.print(f"note: norms are not relative to the base: {error}", highlight=False)
        return {}


def _kinds(spectra: list[LayerSpectrum]) -> dict[str, list[LayerSpectrum]]:
    kinds: dict[str, list[LayerSpectrum]] = {}
    for spectrum in spectra:
        kinds.setdefault(spectrum.kind, []).append(spectrum)
    return kinds


def _table(spectra: list[LayerSpectrum], *, every_layer: bool) -> Table:
    groups = {spectrum.name: [spectrum] for spectrum in spectra} if every_layer else _kinds(spectra)
    table = Table(
        title="change of the weights" + ("" if every_layer else ", middle value of each kind"), title_justify="left"
    )
    columns = (
        "layer",
        "layers",
        "rank",
        "largest sigma",
        "smallest sigma",
        "effective rank",
        "norm",
        "of the weight's",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=name == "layer")
    for name, members in groups.items():

        def middle(values: list[float]) -> str:
            return f"{statistics.median(values):.3g}"

        relative = [s.relative_norm for s in members if s.relative_norm is not None]
        table.add_row(
            name,
            str(len(members)),
            str(max(s.rank for s in members)),
            middle([s.sigma[0] for s in members]),
            middle([s.sigma[-1] for s in members]),
            middle([s.effective_rank for s in members]),
            middle([s.norm for s in members]),
            f"{statistics.median(relative):.2%}" if relative else "",
        )
    return table
