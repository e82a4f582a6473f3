"""What the proof found, for people: a table, sentences, `merge_report.json` and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import qriemann
from qriemann.adapters.base import EMBEDDED_MODEL
from qriemann.release.adapter import SavedAdapter
from qriemann.release.proof import Verdict
from qriemann.release.reload import Differences
from qriemann.release.rows import Rows
from qriemann.training.records import write_json

REPORT = "merge_report.json"
_COLUMNS = ("model", "mean KL", "worst KL", "same top", "held-out loss", "weights")
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


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
    return {**content, "accepted": all(verdict.accepted for verdict in verdicts), "prefer": _preferred(content)}


def public_name(base: str) -> str:
    """The base's name as it may be published: a local path without its folders."""
    local = base != EMBEDDED_MODEL and Path(base).expanduser().exists()
    return Path(base).expanduser().resolve().name if local else base


def write(folder: Path, content: dict[str, Any]) -> None:
    """Writes `merge_report.json` and the model card into the folder."""
    write_json(folder / REPORT, content)
    (folder / "README.md").write_text(card(content), "utf-8")


def rows_of(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows, as text."""
    trained = content["trained"]["loss"]
    lines: list[tuple[str, ...]] = [("trained", "0", "0", "100 %", f"{trained:.3f}", "")]
    named = [("untrained base", content["untrained_base"], "")]
    for merged in content["merged"]:
        weights = merged["weights"]["largest_relative_difference"]
        named.append((f"{merged['into']}, {_SHORT[merged['dtype']]}", merged, f"{weights:.0e}"))
    for name, found, weights in named:
        if "mean_kl" in found:
            figures = (
                f"{found['mean_kl']:.1e}",
                f"{found['worst_kl']:.1e}",
                f"{found['top_agreement']:.1%}".replace("%", " %"),
                f"{found['loss']:.3f} ({found['loss'] - trained:+.3f})",
            )
        else:
            figures = ("rejected", "", "", "")
        lines.append((name, *figures, weights))
    return lines


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
    for name in _COLUMNS:
        drawn.add_column(name, justify="left" if name == "model" else "right", no_wrap=name == "model")
    for line in rows_of(content):
        drawn.add_row(*line)
    return drawn


def conclusions(content: dict[str, Any]) -> list[str]:
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
    if content["prefer"]:
        lines.append(content["prefer"]["why"])
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


def card(content: dict[str, Any]) -> str:
    """The model card: what it is and how near it is to what was trained."""
    prompts = content["prompts"]
    table_lines = ["| " + " | ".join(line) + " |" for line in (_COLUMNS, ("---",) * len(_COLUMNS), *rows_of(content))]
    into = ", ".join(merged["into"] for merged in content["merged"])
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            *([f"base_model: {content['base']}"] if "/" in content["base"] else []),
            "tags: [qriemann, lora, merged]",
            "---",
            "",
            f"# {content['base']}, fine-tuned",
            "",
            f"A LoRA adapter (rank {content['adapter']['rank']}, {content['adapter']['layers']} layers), trained on the "
            f"base in 4 bit and merged into: {into}.",
            "",
            "## Is it what was trained?",
            "",
            f"Compared with the 4-bit base and the adapter on {prompts['rows']} rows "
            f"({prompts['tokens']} tokens) of {prompts['source']}; KL in nats a token; same top: the share of "
            "tokens with the same most likely one. The last column is the largest "
            "relative difference of any tensor from base plus adapter.",
            "",
            *table_lines,
            "",
            *(f"- {line}" for line in conclusions(content)),
            "",
        ]
    )
