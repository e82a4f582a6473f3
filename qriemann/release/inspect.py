"""`inspect`: how an adapter changes each layer, from its factors alone."""

import statistics
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qriemann.adapters.saved_config import check_config
from qriemann.adapters.spectrum import LayerSpectrum, group_by_kind, read_spectra
from qriemann.errors import InputError, listed
from qriemann.release.weights import original_weights, tensor_names
from qriemann.upstream import quiet

PLOT = "inspect.png"

# A layer is dead if it changes less than this share of what the median layer does, and saturated if its effective rank is
# this share of its rank. Methods that orthogonalize their steps saturate every layer from the first step on.
_DEAD, _SATURATED = 1e-3, 0.9
_COLUMNS = ("layer", "layers", "rank", "largest sigma", "smallest sigma", "effective rank", "norm", "of the weight's")


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
    path = Path(adapter).expanduser()
    folder = path if path.is_dir() else path.parent
    spectra = read_spectra(path)
    broken = [spectrum.name for spectrum in spectra if spectrum.norm != spectrum.norm]
    if broken:
        raise InputError(f"{path}: the factors of {broken[0]} are not finite; train or copy the adapter again")
    norms = _base_norms(folder, spectra, base, console)
    spectra = [replace(one, relative_norm=one.norm / norms[one.name] if one.name in norms else None) for one in spectra]
    console.print(_table(spectra, every_layer=every_layer))
    for line in remarks(spectra):
        console.print(line, highlight=False)
    picture = folder / PLOT if plot is None else Path(plot)
    # matplotlib takes longer to import than all of the above.
    from qriemann.release.charts import spectrum_figure

    spectrum_figure(spectra).savefig(picture, dpi=120, format="png")
    console.print(f"drawn in {picture}", highlight=False, soft_wrap=True)
    return spectra


def remarks(spectra: list[LayerSpectrum]) -> list[str]:
    """One sentence for each flag: layers that training left where they were, and those that use every direction they have."""
    middle = statistics.median(spectrum.norm for spectrum in spectra)
    flags = {
        f"dead (below {_DEAD:g} of the median layer's norm)": [s for s in spectra if s.norm <= _DEAD * middle],
        f"saturated (effective rank at least {_SATURATED:.0%} of the rank: usual for methods that orthogonalize their steps, "
        "such as Riemannion; with AdamW a sign that a higher rank may find more)": [
            s for s in spectra if s.rank > 1 and s.effective_rank >= _SATURATED * s.rank
        ],
    }
    lines = []
    for what, layers in flags.items():
        if layers:
            names = listed(layer.name for layer in layers)
            lines.append(f"{len(layers)} of {len(spectra)} layers are {what}: {names}")
    return lines or ["no layer is dead, none is saturated"]


def _base_norms(folder: Path, spectra: list[LayerSpectrum], base: str | None, console: Console) -> dict[str, float]:
    """||W|| of every layer; empty, with a note, where the base cannot be had and was not asked for by name."""
    config = check_config(folder, "inspect")
    name = base or config.get("base_model_name_or_path")
    try:
        if not name:
            raise InputError(f"{folder} does not name its base; name it with --base")
        with quiet():
            weights = original_weights(name, config.get("revision") if base is None else None)
        names: dict[str, str] = {}
        for module in (spectrum.name for spectrum in spectra):
            # A head that is tied to the embeddings has no tensor of its own.
            if any(part.isdigit() for part in module.split(".")) or f"{module}.weight" in weights:
                names |= tensor_names([module], weights, module.partition(".")[0])
        return {module: weights[tensor].float().norm().item() for module, tensor in names.items()}
    except InputError as error:
        if base is not None:
            raise
        console.print(f"note: norms are not relative to the base: {error}", highlight=False)
        return {}


def _table(spectra: list[LayerSpectrum], *, every_layer: bool) -> Table:
    groups = {spectrum.name: [spectrum] for spectrum in spectra} if every_layer else group_by_kind(spectra)
    title = "change of the weights" + ("" if every_layer else ", median of each kind")
    table = Table(title=title, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=name == "layer")
    for name, members in groups.items():
        medians = [
            f"{statistics.median(values):.3g}"
            for values in zip(*((s.sigma[0], s.sigma[-1], s.effective_rank, s.norm) for s in members), strict=True)
        ]
        relative = [s.relative_norm for s in members if s.relative_norm is not None]
        last = f"{statistics.median(relative):.2%}" if relative else ""
        table.add_row(name, str(len(members)), str(max(s.rank for s in members)), *medians, last)
    return table
