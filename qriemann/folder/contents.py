"""The content of a folder that a training, a merge or an export wrote; every part but the model may be missing."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.utils import HFValidationError, validate_repo_id

from qriemann.errors import InputError
from qriemann.folder.files import ROW_FILES

CURVE = "loss.png"
PROOF = "merge_report.json"
GGUF_REPORT = "gguf_report.json"
#: Holds rows of the data, so it does not go up with the model.
ROWS = "trained_rows.json"
# The recipe's demo writes its answers here.
_SAMPLES = "quickstart.json"

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class ModelFolder:
    """A folder and what its files say.

    Attributes:
        kind: a LoRA adapter, a whole (merged) model, GGUF files of either, or a run that left neither yet.
        base: the model it was made from, as it was named when it was made; None if nothing says so.
        samples: answers before and after training, each with question, right, before, after.
        example: the first of these questions as a conversation; empty if there is none.
        scores: (name, before, after) of what was measured on held-out rows.
    """

    path: Path
    kind: Literal["adapter", "model", "gguf", "run"]
    base: str | None
    config: dict[str, Any]
    run: dict[str, Any]
    metrics: list[dict[str, Any]]
    rows: dict[str, Any]
    proof: dict[str, Any]
    exports: list[tuple[Path, dict[str, Any]]]
    samples: list[dict[str, str]]
    example: list[dict[str, str]]
    scores: list[tuple[str, float, float]]
    curve: Path | None

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the run."""
        return _mapping(self.run.get("config"))

    @property
    def written_settings(self) -> dict[str, Any]:
        """The settings that the user wrote; every one that is set if the run does not say which."""
        written = self.run.get("written", self.settings)
        return {key: value for key, value in self.settings.items() if key in written and value is not None}

    @property
    def result(self) -> dict[str, Any]:
        """What the run measured at its end."""
        return _mapping(self.run.get("result"))

    @property
    def answers(self) -> list[list[str]]:
        """Question, right answer, and the answers before and after training, by sample."""
        return [[sample.get(key, "") for key in ("question", "right", "before", "after")] for sample in self.samples]

    @property
    def proof_source(self) -> str:
        """On how many tokens of which rows a merged model was compared with the trained one."""
        prompts = _mapping(self.proof.get("prompts"))
        return f"{prompts.get('tokens', '?')} tokens of {prompts.get('source', 'unknown rows')}"


def read_folder(folder: str | os.PathLike[str], *, run: str | os.PathLike[str] | None = None) -> ModelFolder:
    """The content of a folder.

    Raises:
        InputError: there is no such folder, or nothing of ours or PEFT's in it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    records = path if run is None else Path(run).expanduser()
    run_json = read_json(records / "run.json")
    if run is not None and not run_json:
        raise InputError(f"{records / 'run.json'} cannot be read; name the folder of a training with run")
    adapter, model = read_json(path / "adapter_config.json"), read_json(path / "config.json")
    places = [path, *sorted(found for found in path.iterdir() if found.is_dir())]
    reports = [(place, read_json(place / GGUF_REPORT)) for place in places]
    # What was rejected beside the adapter is not for others.
    exports = [(place, report) for place, report in reports if report and (place == path or report.get("accepted"))]
    is_export = bool(exports) and exports[0][0] == path
    exported_from = exports[0][1].get("base") if is_export else None
    if not (adapter or model or run_json or is_export):
        inner = sorted(found.parent.name for found in path.glob("*/config.json"))
        hint = f"its folder {inner[0]} does" if inner else "check the path"
        raise InputError(f"{path} holds no adapter, merged model or run; {hint}")
    proof = read_json(path / PROOF)
    trained_on = _mapping(run_json.get("model")).get("name_or_path")
    demo = read_json(records / _SAMPLES)
    samples = [sample for sample in demo.get("samples", []) if isinstance(sample, dict)]
    asked = {
        "system": _mapping(demo.get("task")).get("system"),
        "user": samples[0].get("question") if samples else None,
    }
    return ModelFolder(
        path=path,
        kind="gguf" if is_export else "adapter" if adapter else "model" if model else "run",
        base=adapter.get("base_model_name_or_path") or trained_on or proof.get("base") or exported_from,
        config=adapter or model,
        run=run_json,
        metrics=read_lines(records / "metrics.jsonl"),
        rows=read_json(records / ROWS),
        proof=proof,
        exports=exports,
        samples=samples,
        example=[{"role": role, "content": str(text)} for role, text in asked.items() if text and samples],
        scores=_scores(_mapping(run_json.get("result")), demo),
        curve=records / CURVE if (records / CURVE).is_file() else None,
    )


def curve(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of every log event that has a finite value under the key."""
    pairs = [(record.get("step"), record.get(key)) for record in metrics]
    return [
        (int(step), float(value))
        for step, value in pairs
        if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value)
    ]


def proof_rows(proof: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The comparison of merged models with the trained one: a head, the trained, the yardstick, and a row for each base.

    GGUF files have their size where merged models have the largest difference of a weight.
    """
    merged = [entry for entry in proof.get("merged", []) if isinstance(entry, dict)]
    if not merged:
        return []
    trained = _mapping(proof.get("trained")).get("loss")
    sized = any("bytes" in entry for entry in merged)
    rows: list[tuple[str, ...]] = [
        ("model", "mean KL", "worst KL", "same top", "held-out loss", "size" if sized else "weights", "verdict"),
        ("trained", "0", "0", "100 %", _figure(trained, ".3f"), "", ""),
        ("untrained base", *_compared(_mapping(proof.get("untrained_base")), trained), "", ""),
    ]
    for entry in merged:
        short = _SHORT.get(entry.get("dtype", ""), entry.get("dtype"))
        name = str(entry.get("into")) if sized else f"{entry.get('into')}, {short}"
        weights = _mapping(entry.get("weights")).get("largest_relative_difference")
        size = entry.get("bytes")
        last = f"{size / 1e6:.0f} MB" if isinstance(size, int) else _figure(weights, ".0e")
        judged = "accepted" in entry
        verdict = "accepted" if entry.get("accepted") else f"rejected: {'; '.join(map(str, entry.get('reasons', [])))}"
        rows.append((name, *_compared(entry, trained), last, verdict if judged else "unproved"))
    return rows


def _compared(figures: Mapping[str, Any], trained: Any) -> tuple[str, ...]:
    loss = figures.get("loss")
    more = f" ({loss - trained:+.3f})" if isinstance(loss, int | float) and isinstance(trained, int | float) else ""
    share = _figure(figures.get("top_agreement"), ".1%").replace("%", " %")
    return (*(_figure(figures.get(key), ".1e") for key in ("mean_kl", "worst_kl")), share, _figure(loss, ".3f") + more)


def _figure(value: Any, form: str) -> str:
    return f"{value:{form}}" if isinstance(value, int | float) else ""


def is_hub_id(name: str) -> bool:
    """Whether the name is OWNER/NAME of a Hub repository rather than something on this machine."""
    if name.count("/") != 1 or Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith((".gguf", *ROW_FILES))


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in the file; an empty one if there is none that can be read."""
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; lines that are none are left out, as the last one of a run that crashed."""
    try:
        # A pipe or device would never end.
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = _mapping(json.loads(line))
        except (ValueError, RecursionError):
            continue
        if isinstance(record.get("step"), int):
            records.append(record)
    return records


def _scores(result: Mapping[str, Any], demo: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    pairs = [("held-out loss (nats a token)", result.get("eval_loss_before"), result.get("eval_loss"))]
    match = _mapping(demo.get("exact_match"))
    pairs.append(("exact match", match.get("before"), match.get("after")))
    return [
        (name, float(before), float(after))
        for name, before, after in pairs
        if isinstance(before, int | float) and isinstance(after, int | float)
    ]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
