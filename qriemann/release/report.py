"""`report.html`: one run on one page, with nothing to load from anywhere."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from markupsafe import Markup

from qriemann.adapters.spectrum import LayerSpectrum, group_by_kind, read_spectra
from qriemann.errors import InputError
from qriemann.folder.contents import ModelFolder, proof_rows, read_folder
from qriemann.folder.files import replace_text
from qriemann.release.charts import as_svg, draw_curves, spectrum_figure
from qriemann.release.templates import render_document

REPORT = "report.html"

# (key in the run's result, form, name)
_TILES = (
    ("train_loss", "{:.4f}", "training loss"),
    ("steps", "{}", "steps"),
    ("tokens_per_s", "{:.0f}", "tokens/s"),
    ("peak_gib", "{:.2f} GiB", "peak memory"),
    ("orthonormality_drift", "{:.1e}", "orthonormality drift"),
)


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` about a run, an adapter or a merged model into its folder, and returns its path.

    Raises:
        InputError: there is nothing to report on.
    """
    found = read_folder(folder)
    try:
        spectra = read_spectra(found.path) if found.kind == "adapter" else []
    except InputError:  # the page says what can be said
        spectra = []
    page = render_document(
        "report.html.jinja",
        found=found,
        name=found.path.resolve().name,
        status=str(found.run.get("status", "")),
        summary=_summary(found),
        tiles=list(_tiles(found)),
        curves=[(title, Markup(svg)) for title, svg in draw_curves(found.metrics)],
        rows=found.rows,
        proof=proof_rows(found.proof),
        exports=[(proof_rows(report), report) for _, report in found.exports],
        spectrum=Markup(as_svg(spectrum_figure(spectra))) if spectra else "",
        kinds=[_kind(kind, layers) for kind, layers in group_by_kind(spectra).items()],
        settings=[(key, _plain(value)) for key, value in found.written_settings.items()],
        every_setting=yaml.safe_dump(found.settings, sort_keys=True, allow_unicode=True),
        provenance=list(_provenance(found)),
    )
    path = found.path / REPORT
    replace_text(path, page)
    return path


def _summary(found: ModelFolder) -> str:
    what = {"adapter": "LoRA adapter", "model": "Model", "gguf": "GGUF files", "run": "Run"}[found.kind]
    base = "base unknown" if found.base is None else f"on {found.base}"
    method = f", {found.settings['method']}" if "method" in found.settings else ""
    started = f", started {found.run['started_at']}" if "started_at" in found.run else ""
    return f"{what} {base}{method}{started}"


def _tiles(found: ModelFolder) -> Iterator[tuple[str, str]]:
    """(value, name) of the figures at the top."""
    for name, before, after in found.scores:
        yield f"{before:.4g} → {after:.4g}", name
    for key, form, name in _TILES:
        if found.result.get(key) is not None:
            yield _number(found.result[key], form), name
    if found.run.get("wall_clock_s"):
        yield _number(found.run["wall_clock_s"], "{:.0f} s"), "wall clock"
    steps = found.run.get("steps")
    if isinstance(steps, dict) and steps.get("skipped"):
        yield str(steps["skipped"]), "steps skipped"


def _kind(kind: str, layers: Sequence[LayerSpectrum]) -> tuple[str, ...]:
    largest = [layer.sigma[0] for layer in layers]
    return (
        kind,
        str(len(layers)),
        str(max(layer.rank for layer in layers)),
        f"{median(largest):.3g} ({min(largest):.3g} to {max(largest):.3g})",
        f"{median(layer.effective_rank for layer in layers):.1f}",
    )


def _provenance(found: ModelFolder) -> Iterator[tuple[str, str]]:
    for name in ("data", "model", "device", "versions"):
        content = found.run.get(name)
        if isinstance(content, dict):
            for key, value in content.items():
                if value:
                    yield f"{name}: {key.replace('_', ' ')}", _plain(value)


def _plain(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else str(value)
