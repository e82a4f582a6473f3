"""The pictures of a report, as SVG text for its page, and of a run and `inspect`, as PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qriemann.adapters.spectrum import LayerSpectrum, group_by_kind
from qriemann.folder.contents import curve
from qriemann.folder.files import replace_file

# Colours that differ in lightness too, for those who cannot tell red from green [Okabe and Ito 2008].
_BLUE, _ORANGE = "#0072B2", "#D55E00"
# (title, unit, logarithmic, [(key of the record, name of the line, colour, marker)])
_Curve = tuple[str, str, bool, tuple[tuple[str, str, str, str], ...]]
_CURVES: tuple[_Curve, ...] = (
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
    figures = ((drawn[0], _curve_figure(metrics, drawn)) for drawn in _CURVES)
    return [(title, as_svg(figure)) for title, figure in figures if figure is not None]


def plot_losses(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Draws training and held-out loss over the steps as a PNG file."""
    figure = _curve_figure(metrics, _CURVES[0]) or _figure(6.4, 3.0)
    figure.suptitle("Loss")
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def _curve_figure(metrics: list[dict[str, Any]], drawn: _Curve) -> Any | None:
    _, unit, logarithmic, lines = drawn
    points = {key: curve(metrics, key) for key, *_ in lines}
    if not any(points.values()):
        return None
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
    return figure


def spectrum_figure(spectra: Sequence[LayerSpectrum]) -> Any:
    """The singular values of every layer, a panel for each kind of layer, light to dark from the first to the last.

    The last panel has the norms along the depth, relative to the weights' if these are known.
    """
    from matplotlib import colormaps

    kinds = group_by_kind(list(spectra))
    columns = min(len(kinds) + 1, _PANELS_A_ROW)
    rows = -(-(len(kinds) + 1) // columns)
    figure = _figure(3.2 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    panels, depth = axes[: len(kinds)], axes[len(kinds)]
    # Zero has no place on a logarithmic axis.
    positive = any(value > 0 for layer in spectra for value in layer.sigma)
    for panel, (kind, layers) in zip(panels, kinds.items(), strict=True):
        for index, layer in enumerate(layers):
            shade = 0.25 + 0.7 * index / max(len(layers) - 1, 1)
            panel.plot(range(1, len(layer.sigma) + 1), layer.sigma, color=colormaps["Blues"](shade), linewidth=0.8)
        panel.sharey(panels[0])
        panel.set(title=kind, xlabel="index", yscale="log" if positive else "linear")
        norms = [layer.norm if layer.relative_norm is None else layer.relative_norm for layer in layers]
        depth.plot(norms, marker=".", markersize=4, linewidth=1, label=kind)
    for number, panel in enumerate(panels):
        panel.tick_params(which="both", labelleft=number % columns == 0)
        panel.set_ylabel("singular value" if number % columns == 0 else "")
    relative = spectra[0].relative_norm is not None
    depth.set(title="norm of the change" + (" / norm of the weight" if relative else ""), xlabel="block")
    depth.set_ylim(bottom=0)
    depth.legend(fontsize="x-small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for panel in axes[len(kinds) + 1 :]:
        panel.set_visible(False)
    for panel in axes:
        panel.title.set_fontsize(9)
    return figure


def _figure(width: float, height: float) -> Any:
    # Figure alone; pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_svg(figure: Any) -> str:
    """The figure as an `<svg>` element, its text kept as text."""
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
