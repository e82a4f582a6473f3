"""What the proof found: the content of `merge_report.json`, and for a terminal a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import qriemann
from qriemann.adapters.saved import SavedAdapter
from qriemann.base.gguf import EMBEDDED_MODEL
from qriemann.evaluation.proof import Verdict
from qriemann.evaluation.reload import Differences
from qriemann.evaluation.rows import Rows
from qriemann.folder.contents import proof_rows


def describe(base: str, adapter: SavedAdapter, rows: Rows, untrained: Differences) -> dict[str, Any]:
    """The report's part that holds before anything is judged. Nothing in it tells where a file lay."""
    return {
        "base": public_name(base),
        "adapter": {
            "layers": len(adapter.layers),
            "rank": max(layer.a.shape[0] for layer in adapter.layers.values()),
        },
        "prompts": {"source": rows.source, "rows": len(rows.rows), "tokens": rows.tokens, "notices": rows.notices},
        "trained": {"loss": untrained["recorded_loss"]},
        "untrained_base": dict(untrained),
        "qriemann": qriemann.__version__,
    }


def complete(described: dict[str, Any], verdicts: list[Verdict]) -> dict[str, Any]:
    """The whole report."""
    content = {**described, "merged": [verdict.as_dict() for verdict in verdicts]}
    prefer = _preferred(content)
    accepted = all(verdict.accepted for verdict in verdicts)
    return {**content, "accepted": accepted, "prefer": prefer, "conclusions": _conclusions(content, prefer)}


def public_name(base: str) -> str:
    """The base's name as it may be published: a local path without its folders."""
    local = base != EMBEDDED_MODEL and Path(base).expanduser().exists()
    return Path(base).expanduser().resolve().name if local else base


def table(content: dict[str, Any]) -> Table:
    """The comparison for a terminal."""
    prompts = content["prompts"]
    # The heavy frame would not fit into 80 columns.
    drawn = Table(
        title=f"against the trained model, {prompts['tokens']} tokens of {prompts['source']}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    # Without the last column, the verdict: its reasons are sentences of their own.
    head, *lines = (row[:-1] for row in proof_rows(content))
    for name in head:
        drawn.add_column(name, justify="left" if name == "model" else "right", no_wrap=name == "model")
    for line in lines:
        drawn.add_row(*line)
    return drawn


def _conclusions(content: dict[str, Any], prefer: dict[str, str] | None) -> list[str]:
    """One sentence for each thing to know: what was rejected, which base to prefer, what the figures are about."""
    lines = []
    untrained = content["untrained_base"]["mean_kl"]
    for merged in content["merged"]:
        lines += [f"rejected: {merged['into']}: {reason}" for reason in merged["reasons"]]
        if merged.get("mean_kl", 0) > untrained:
            lines.append(
                f"{merged['into']} is farther from the trained model than the untrained base is (mean KL "
                f"{merged['mean_kl']:.2g} against {untrained:.2g}): on these rows, leaving the base that was trained on "
                "changes more than the training did"
            )
    if prefer:
        lines.append(prefer["why"])
    if content["prompts"]["source"] == "the built-in prompts":
        lines.append(
            "the prompts are general ones; --data with rows like those it was trained for says more about their kind"
        )
    return lines


def _preferred(content: dict[str, Any]) -> dict[str, str] | None:
    """The accepted base that is nearest to what was trained."""
    accepted = sorted((m for m in content["merged"] if m["accepted"]), key=lambda merged: merged["mean_kl"])
    if not accepted:
        return None
    best, others = accepted[0], accepted[1:]
    why = f"mean KL {best['mean_kl']:.2g} nats a token"
    if others:
        why += " against " + " and ".join(f"{other['mean_kl']:.2g} for {other['into']}" for other in others)
        return {"into": best["into"], "why": f"prefer {best['into']}: {why}"}
    if best["into"] == "nf4-dequantized":
        return {
            "into": best["into"],
            "why": f"nf4-dequantized is the base to prefer: the adapter was trained on it; {why}",
        }
    why += "; the adapter was trained on the 4-bit base, so compare with --into nf4-dequantized before you choose"
    return {"into": best["into"], "why": f"only {best['into']} was measured: {why}"}
