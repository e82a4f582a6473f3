"""`report.html`: one run on one page, with nothing to load from anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from qriemann.folder.contents import ModelFolder, proof_rows, read_folder
from qriemann.release.charts import draw_curves, draw_spectrum
from qriemann.release.saved_spectrum import LayerSpectrum, read_spectrum

REPORT = "report.html"

_STYLE = """
:root { --ink: #1b1f24; --dim: #5f6b7a; --line: #dde3ea; --paper: #fff; --ground: #f5f7f9; --bad: #b42318; --good: #067647; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 12px; }
p.dim, .dim { color: var(--dim); margin: 4px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 12px; margin-top: 20px; }
.tile, figure, .box { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 12px; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: 14px; }
figure svg { display: block; width: 100%; height: auto; }
.box { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 500; }
tr:last-child td { border-bottom: 0; }
td { overflow-wrap: anywhere; white-space: pre-wrap; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
.good { color: var(--good); }
.bad { color: var(--bad); }
summary { cursor: pointer; color: var(--dim); }
"""


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` about a run, an adapter or a merged model into its folder, in one move, and returns its path.

    Raises:
        InputError: there is nothing to report on.
    """
    found = read_folder(folder)
    page = render(found, read_spectrum(found.path, found.config) if found.kind == "adapter" else [])
    path, partial = found.path / REPORT, found.path / f".{REPORT}.{os.getpid()}.tmp"
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def render(found: ModelFolder, spectra: Sequence[LayerSpectrum]) -> str:
    """The page as HTML; every part that the folder has nothing for is left out."""
    status = str(found.run.get("status", ""))
    name = found.path.resolve().name
    base = "base unknown" if found.base is None else f"on {found.base}"
    method = f", {found.settings['method']}" if "method" in found.settings else ""
    started = f", started {found.run['started_at']}" if "started_at" in found.run else ""
    good = "good" if status == "finished" else "bad"
    badge = f' <span class="{good}">{escape(status)}</span>' if status else ""
    what = {"adapter": "LoRA adapter", "model": "Model", "run": "Run"}[found.kind]
    parts = [
        f"<h1>{escape(name)}{badge}</h1>",
        f'<p class="dim">{escape(f"{what} {base}{method}{started}")}</p>',
        _tiles(found),
        _section("Curves", _charts(found)),
        _section("Before and after", _samples(found)),
        _section("Merged: is it what was trained?", _proof(found.proof)),
        _section("Singular values of the change of each weight", _spectrum(spectra)),
        _section("Settings", _settings(found)),
        _section("Data and machine", _provenance(found)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n<body><main>\n'
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _tiles(found: ModelFolder) -> str:
    result = found.result
    shown = [(f"{before:.4g} → {after:.4g}", name) for name, before, after in found.scores]
    for key, form, name in (
        ("train_loss", "{:.4f}", "training loss"),
        ("steps", "{}", "steps"),
        ("tokens_per_s", "{:.0f}", "tokens/s"),
        ("peak_gib", "{:.2f} GiB", "peak memory"),
        ("orthonormality_drift", "{:.1e}", "orthonormality drift"),
    ):
        if result.get(key) is not None:
            shown.append((_number(result[key], form), name))
    if found.run.get("wall_clock_s"):
        shown.append((_number(found.run["wall_clock_s"], "{:.0f} s"), "wall clock"))
    skipped = (found.run.get("steps") or {}).get("skipped") if isinstance(found.run.get("steps"), dict) else None
    if skipped:
        shown.append((str(skipped), "steps skipped"))
    tiles = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in shown)
    return f'<div class="tiles">{"".join(tiles)}</div>' if shown else ""


def _charts(found: ModelFolder) -> str:
    figures = (
        f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in draw_curves(found.metrics)
    )
    body = "".join(figures)
    return f'<div class="charts">{body}</div>' if body else ""


def _samples(found: ModelFolder) -> str:
    keys = ("question", "right", "before", "after")
    rows = [[sample.get(key, "") for key in keys] for sample in found.samples]
    return _table(["Asked", "Right answer", "Before", "After"], rows) if rows else ""


def _proof(proof: Mapping[str, Any]) -> str:
    rows = proof_rows(proof)
    if not rows:
        return ""
    prompts = proof.get("prompts") or {}
    on = f"{prompts.get('tokens', '?')} tokens of {prompts.get('source', 'unknown rows')}; KL in nats a token."
    remarks = "".join(f'<p class="dim">{escape(str(line))}</p>' for line in proof.get("conclusions", []))
    return _table(rows[0], rows[1:]) + f'<p class="dim">{escape(on)}</p>{remarks}'


def _spectrum(spectra: Sequence[LayerSpectrum]) -> str:
    if not spectra:
        return ""
    rows = []
    for kind in dict.fromkeys(layer.kind for layer in spectra):
        layers = [layer for layer in spectra if layer.kind == kind]
        largest = [max(layer.values, default=0.0) for layer in layers]
        rows.append(
            (
                kind,
                str(len(layers)),
                str(max(len(layer.values) for layer in layers)),
                f"{median(largest):.3g} ({min(largest):.3g} to {max(largest):.3g})",
                f"{median(layer.effective_rank for layer in layers):.1f}",
            )
        )
    head = ["Layers", "Number", "Rank", "Largest singular value, median (range)", "Effective rank, median"]
    return f"<figure>{draw_spectrum(spectra)}</figure><p></p>{_table(head, rows)}"


def _settings(found: ModelFolder) -> str:
    if not found.settings:
        return ""
    every = yaml.safe_dump(found.settings, sort_keys=True, allow_unicode=True)
    main = _table(["Setting", "Value"], [(key, _plain(value)) for key, value in found.main_settings.items()])
    return f'{main}<p></p><details class="box"><summary>every setting</summary><pre>{escape(every)}</pre></details>'


def _provenance(found: ModelFolder) -> str:
    rows = []
    for name in ("data", "model", "device", "versions"):
        content = found.run.get(name)
        if isinstance(content, dict):
            rows += [(f"{name}: {key.replace('_', ' ')}", _plain(value)) for key, value in content.items() if value]
    return _table(["What", "Value"], rows) if rows else ""


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="box"><table><tr>{names}</tr>{lines}</table></div>'


def _plain(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else str(value if value is not None else "")
