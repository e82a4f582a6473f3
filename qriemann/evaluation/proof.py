"""The proof that what was written is what was trained.

Weights: each tensor read back must be the base's plus what PEFT says the adapter adds, rounded as the files are. That finds
any damage. Behaviour: a fresh process loads the folder with transformers alone, and its next-token distributions are compared
with those of the trained model. That measures the cost of leaving the base that the adapter was trained on.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

import qriemann
from qriemann.adapters.saved import SavedAdapter
from qriemann.base.gguf import EMBEDDED_MODEL
from qriemann.device import compute_device, explaining_memory, free_bytes
from qriemann.errors import ShortMemoryError
from qriemann.evaluation import reload
from qriemann.evaluation.reload import Differences, ScoredRow
from qriemann.evaluation.rows import Rows
from qriemann.evaluation.trained import Trained, load_trained
from qriemann.folder.contents import proof_rows

# Largest relative difference of a tensor that only rounding explains. Measured on the embedded model: 1e-7 at float32; at
# half precision and in 4 bit a float32 sum taken in another order moves a few weights to the neighbouring value.
_WEIGHT_RTOL = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-4, "nf4": 1e-3}


@dataclass(frozen=True)
class Candidate:
    """A folder to be judged."""

    folder: Path
    into: str
    dtype: str
    weights: tuple[float, str]
    max_kl: float

    @property
    def weights_bound(self) -> float:
        """Of the relative difference of a tensor."""
        return _WEIGHT_RTOL["nf4" if self.into == "nf4" else self.dtype]

    @property
    def weights_are_right(self) -> bool:
        return self.weights[0] <= self.weights_bound


@dataclass(frozen=True)
class Verdict:
    """What the proof of one folder found.

    Attributes:
        found: the comparison with the trained model; None if the weights are wrong or the folder did not load.
        reasons: why it is rejected; empty if it is accepted.
    """

    candidate: Candidate
    found: Differences | None
    reasons: list[str]

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        difference, tensor = self.candidate.weights
        return {
            "into": self.candidate.into,
            "dtype": self.candidate.dtype,
            "accepted": self.accepted,
            "reasons": self.reasons,
            "max_kl": self.candidate.max_kl,
            **({"weights": {"largest_relative_difference": difference, "tensor": tensor}} if tensor else {}),
            **(self.found or {}),
        }


@dataclass(frozen=True)
class Recording:
    """Logits of the trained model on the rows, in a file, and how far the untrained base is from them."""

    path: Path
    rows: list[ScoredRow]
    untrained: Differences


def load_and_record(
    saved: SavedAdapter,
    base: str | None,
    revision: str | None,
    quantize: str | None,
    data: str | None,
    path: Path,
    console: Console,
    max_tokens: int | None = None,
) -> tuple[Trained, Rows, Recording]:
    """The trained model, the rows of the proof and what the model says to them; on the CPU where the card is too small."""

    def attempt(device: str | None) -> tuple[Trained, Rows, Recording]:
        trained = load_trained(saved, base, revision, console, quantize=quantize, device=device)
        rows = trained.proof_rows(data, console, max_tokens)
        console.print(f"Recording the trained model on {rows.source}, {rows.tokens} tokens ...", highlight=False)
        with explaining_memory("recording the trained model", "shorten the longest rows of --data"):
            logits = {str(index): row.contiguous() for index, row in reload.logits_of_rows(trained.peft, rows.rows)}
            save_file(logits, path)
            with trained.untrained() as model:
                return trained, rows, Recording(path, rows.rows, reload.differences(model, rows.rows, path))

    try:
        return attempt(None)
    except ShortMemoryError as error:
        if compute_device().type == "cpu":
            raise
        console.print(f"{error}: on the CPU instead", highlight=False, soft_wrap=True)
    # Not in the handler: the exception keeps what was on the card alive.
    clear_device_cache(garbage_collection=True)
    return attempt("cpu")


def worst_weight(
    expected: Callable[[str], Tensor], names: Iterable[str], read: Callable[[str], Tensor | None]
) -> tuple[float, str]:
    """The largest relative Frobenius difference of a tensor that was read back, and its name; infinite if one is missing."""
    worst = (0.0, next(iter(names)))
    for name in names:
        right, found = expected(name).float(), read(name)
        if found is None or found.shape != right.shape:
            return float("inf"), name
        difference = (found.float() - right).norm().item() / max(right.norm().item(), 1e-30)
        # Written so that a NaN counts as the worst.
        if not difference <= worst[0]:
            worst = (difference, name)
    return worst


def judge(candidates: list[Candidate], recording: Recording, console: Console) -> list[Verdict]:
    """The verdict on each folder; those whose weights are right are loaded in a fresh process."""
    found = iter(_reload([one for one in candidates if one.weights_are_right], recording, console))
    return [_verdict(one, next(found) if one.weights_are_right else None) for one in candidates]


def _verdict(candidate: Candidate, found: dict[str, Any] | None) -> Verdict:
    if found is None:
        difference, tensor = candidate.weights
        reason = (
            f"{tensor} is not the base's plus the adapter's: relative difference {difference:.1e}, above "
            f"{candidate.weights_bound:.0e}"
        )
        return Verdict(candidate, None, [reason])
    if "failure" in found:
        return Verdict(candidate, None, [found["failure"]])
    return Verdict(candidate, found, far_from_trained(found, candidate.max_kl, "the trained model"))  # type: ignore[arg-type]


def far_from_trained(found: Mapping[str, Any], max_kl: float, what: str) -> list[str]:
    """The reason to reject a model whose mean KL is above the bound, or is no number; empty below."""
    if found["mean_kl"] <= max_kl:
        return []
    return [f"mean KL to {what} is {found['mean_kl']:.2e} nats a token, above {max_kl:.0e}"]


def _reload(candidates: list[Candidate], recording: Recording, console: Console) -> list[dict[str, Any]]:
    """What a fresh process finds in each folder."""
    if not candidates:
        return []
    models = [(str(one.folder.resolve()), *_compute_on(one.folder)) for one in candidates]
    where = " and ".join(dict.fromkeys(f"on {device} in {dtype}" for _, dtype, device in models))
    console.print(f"Loading what was written in a fresh process, {where} ...", highlight=False)
    request, result = recording.path.with_name("request.json"), recording.path.with_name("result.json")
    content = {
        "models": models,
        "rows": recording.rows,
        "recorded": str(recording.path),
        "result": str(result),
    }
    request.write_text(json.dumps(content), "utf-8")
    # -P: the script's own folder, which is inside this package, is not where the process looks for modules.
    command = [sys.executable, "-P", reload.__file__, str(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # Killed for memory, most likely: the script reports what is wrong with a folder.
        why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        return [{"failure": f"the fresh process ended with status {done.returncode}: {why}"}] * len(candidates)
    return json.loads(result.read_text("utf-8"))


def _compute_on(folder: Path) -> tuple[str, str]:
    """The dtype and the device for the proof: float32 on the card where the model fits beside what is there, else the CPU.

    On the CPU half precision stays half where float32 does not fit.
    """
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    dtype = json.loads((folder / "config.json").read_text("utf-8")).get("dtype", "float32")
    # Half precision doubles, and so do the floats beside 4-bit weights; a GiB for logits, activations and libraries.
    needed = 1.1 * stored * (1 if dtype == "float32" else 2) + 2**30
    if torch.cuda.is_available() and needed <= torch.cuda.mem_get_info()[0]:
        return "float32", "cuda"
    fits = dtype == "float32" or needed <= free_bytes(torch.device("cpu"))
    return "float32" if fits else dtype, "cpu"


def describe(trained: Trained, rows: Rows, untrained: Differences) -> dict[str, Any]:
    """The report's part that holds before anything is judged; nothing in it tells where a file lay."""
    return {
        "base": _public_name(trained.base),
        "trained_on": trained.trained_on,
        "adapter": {
            "layers": len(trained.adapter.layers),
            "rank": max(layer.a.shape[0] for layer in trained.adapter.layers.values()),
        },
        "prompts": {"source": rows.source, "rows": len(rows.rows), "tokens": rows.tokens, "notices": rows.notices},
        "trained": {"loss": untrained["recorded_loss"]},
        "untrained_base": dict(untrained),
        "qriemann": qriemann.__version__,
    }


def conclude(described: dict[str, Any], verdicts: list[Verdict]) -> dict[str, Any]:
    """The whole report: what was found of each base, which one to prefer, and a sentence for each thing to know."""
    merged = [verdict.as_dict() for verdict in verdicts]
    accepted = all(verdict.accepted for verdict in verdicts)
    content = {
        **described,
        "merged": merged,
        "accepted": accepted,
        "prefer": _preferred(merged, described["trained_on"]),
    }
    return {**content, "conclusions": _conclusions(content)}


def table(content: dict[str, Any]) -> Table:
    """The report's comparison for a terminal."""
    prompts = content["prompts"]
    # All figures are whole at 60 columns: a name is folded, and a loss stands above its difference.
    drawn = Table(
        title=f"against the trained model, {prompts['tokens']} tokens of {prompts['source']}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    # Without the last column, the verdict: its reasons are sentences of their own.
    head, *lines = (row[:-1] for row in proof_rows(content))
    drawn.add_column(head[0], overflow="fold")
    for name in head[1:]:
        loss = "loss" in name
        drawn.add_column(name.replace(" ", "\n"), justify="right", no_wrap=not loss, min_width=8 if loss else None)
    for line in lines:
        drawn.add_row(*line)
    return drawn


def _public_name(base: str) -> str:
    """The base's name as it may be published: a local path without its folders."""
    path = Path(base).expanduser()
    return path.resolve().name if base != EMBEDDED_MODEL and path.exists() else base


def _conclusions(content: dict[str, Any]) -> list[str]:
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
        lines.append("the prompts are general ones; --data with rows like the training's says more about their kind")
    return lines


def _preferred(merged: list[dict[str, Any]], trained_on: str) -> dict[str, str] | None:
    """The accepted base that is nearest to what was trained."""
    accepted = sorted((one for one in merged if one["accepted"]), key=lambda one: one["mean_kl"])
    if not accepted:
        return None
    best, others = accepted[0], accepted[1:]
    into, why = best["into"], f"prefer {best['into']}: mean KL {best['mean_kl']:.2g} nats a token"
    if others:
        why += " against " + " and ".join(f"{other['mean_kl']:.2g} for {other['into']}" for other in others)
    elif into == trained_on:
        why += "; the adapter was trained on it"
    else:
        why += f"; the adapter was trained on {trained_on}, so compare with --into {trained_on} before you choose"
    return {"into": into, "why": why}
