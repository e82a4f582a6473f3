"""The pictures of a report, as SVG text to be put into a page: readable without a network, sharp at any size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from qriemann.folder.contents import curve
from qriemann.release.saved_spectrum import LayerSpectrum

# Colours that differ in lightness too, for those who cannot tell red from green [Okabe and Ito 2008].
_BLUE, _ORANGE = "#0072B2", "#D55E00"
# (title, unit, logarithmic, [(key of the record, name of the line, colour, marker)])
_CURVES: tuple[tuple[str, str, bool, tuple[tuple[str, str, str, str], ...]], ...] = (
    (
        "Loss",
        "nats a token",
        False,
        (("loss", "training", _BLUE, ""), ("eval_loss", "held out", _ORANGE, "o")),
    ),
    ("Learning rate", "", False, (("learning_rate", "learning rate", _BLUE, ""),)),
    ("Speed", "tokens/s", False, (("tokens_per_s", "tokens/s", _BLUE, ""),)),
    ("Peak memory", "GiB", False, (("peak_gib", "peak memory", _BLUE, ""),)),
    ("Gradient norm", "", True, (("grad_norm", "gradient norm", _BLUE, ""),)),
)
_PANELS_A_ROW = 4


def draw_curves(metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, SVG) of every curve that the metrics have points for.

    Each line is a group whose id is `curve-KEY`.
    """
    drawn = []
    for title, unit, logarithmic, lines in _CURVES:
        points = {key: curve(metrics, key) for key, *_ in lines}
        if not any(points.values()):
            continue
        figure = _figure(6.4, 3.0)
        axes = figure.add_subplot()
        for key, name, colour, marker in lines:
            if points[key]:
                steps, values = zip(*points[key], strict=True)
                # A line through one point is invisible.
                shown = marker or ("o" if len(steps) == 1 else None)
                (line,) = axes.plot(steps, values, color=colour, marker=shown, markersize=4, linewidth=1.5, label=name)
                line.set_gid(f"curve-{key}")
        if logarithmic and all(value > 0 for pairs in points.values() for _, value in pairs):
            axes.set_yscale("log")
        elif not logarithmic:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        if len(lines) > 1:
            axes.legend(frameon=False)
        drawn.append((title, _svg(figure)))
    return drawn


def draw_spectrum(spectra: Sequence[LayerSpectrum]) -> str:
    """The singular values of every layer, one panel for each kind of layer, light to dark from first to last."""
    from matplotlib import colormaps

    kinds = list(dict.fromkeys(layer.kind for layer in spectra))
    columns = min(len(kinds), _PANELS_A_ROW)
    rows = -(-len(kinds) // columns)
    figure = _figure(3.2 * columns, 2.6 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, kind in zip(panels, kinds, strict=False):
        layers = [layer for layer in spectra if layer.kind == kind]
        for index, layer in enumerate(layers):
            shade = 0.25 + 0.7 * index / max(len(layers) - 1, 1)
            axes.plot(range(1, len(layer.values) + 1), layer.values, color=colormaps["Blues"](shade), linewidth=0.8)
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("index")
    if any(value > 0 for layer in spectra for value in layer.values):
        panels[0].set_yscale("log")
    for axes in panels[::columns]:
        axes.set_ylabel("singular value")
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    return _svg(figure)


def _figure(width: float, height: float) -> Any:
    # Figure alone; pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    # Text stays text, to be read aloud, searched and selected.
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    content = text.getvalue()
    # What stands before it, an XML declaration and a document type, has no place inside a page.
    return content[content.index("<svg") :]
