"""The records of a run: `run.json` at its beginning, the figures at its end, and the table that is printed."""

import time
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from qriemann.folder import records
from qriemann.folder.contents import CURVE, curve, read_json
from qriemann.training.display import summary_table
from qriemann.training.monitor import Monitor
from qriemann.training.prepare import Prepared
from qriemann.upstream import name_of


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run.

    Attributes:
        output_dir: holds the adapter, its tokenizer, `metrics.jsonl`, `run.json`, `loss.png` and `report.html`.
        kept_step: the step after which the adapter was as it is saved: the last, or the best with load_best_model_at_end.
        train_loss: last logged loss, in nats a token; None if nothing was logged.
        eval_loss_before, eval_loss: held-out loss before the first step and at the end; None without held-out rows.
        tokens_per_s: tokens through the model per second of training, without padding and evaluations.
        peak_gib: peak memory, allocated on the GPU or resident on the CPU.
        orthonormality_drift: max |U^T U - I| over the factors when it was last logged.
        wall_clock_s: from the start of the preparation.
        trainer: still usable, for an evaluation of one's own.
    """

    output_dir: Path
    steps: int
    kept_step: int
    train_loss: float | None
    eval_loss_before: float | None
    eval_loss: float | None
    tokens_per_s: float
    peak_gib: float
    orthonormality_drift: float | None
    wall_clock_s: float
    trainer: SFTTrainer
    model: Any
    tokenizer: PreTrainedTokenizerBase


def describe_run(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """The content of `run.json` when the run begins, in a folder that may hold an earlier one's."""
    settings, data, model, found = prepared.settings, prepared.data, prepared.model, prepared.found
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "resumed_from": found.path and str(found.path),
        "passed_over": found.passed_over,
        "earlier": _earlier(folder) if settings.resume else [],
        "seed": prepared.args.seed,
        "written": sorted(settings.written),
        "data": {
            "fingerprint": prepared.fingerprints["data"],
            "format": data.row_format,
            "train_rows": len(data.train),
            "trained_tokens": int(prepared.account.train.trained.sum()),
            "held_out_rows": len(data.held_out or ()),
            "notices": data.notices,
        },
        **records.environment(prepared.args.device),
        "model": {
            "name_or_path": name_of(model),
            "parameters": model.num_parameters(),
            **prepared.fingerprints["loaded"],
            "dequantized": prepared.dense and asdict(prepared.dense),
        },
        "config": prepared.described,
    }


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """How earlier processes that trained in the folder ended, oldest first."""
    before = read_json(folder / records.RUN)
    told = before.get("earlier")
    last = {key: before.get(key) for key in ("started_at", "resumed_from", "status", "reason", "wall_clock_s")}
    return [*(told if isinstance(told, list) else []), last] if before else []


def summarize(prepared: Prepared, folder: Path, trainer: SFTTrainer, monitor: Monitor) -> TrainResult:
    """The result of a training that has ended; evaluates once more where the last held-out loss is not the end's."""
    state, args = trainer.state, trainer.args
    best = args.load_best_model_at_end and state.best_model_checkpoint
    losses, drifts = curve(monitor.records, "loss"), curve(monitor.records, "orthonormality_drift")
    return TrainResult(
        output_dir=folder,
        steps=state.global_step,
        kept_step=state.best_global_step if best else state.global_step,
        train_loss=losses[-1][1] if losses else None,
        eval_loss_before=next((value for step, value in curve(monitor.records, "eval_loss") if step == 0), None),
        eval_loss=None if prepared.data.held_out is None else _final_eval_loss(trainer),
        tokens_per_s=round(monitor.tokens_per_s, 1),
        peak_gib=round(records.peak_gib(args.device), 3),
        orthonormality_drift=drifts[-1][1] if drifts else None,
        wall_clock_s=since(prepared.started),
        trainer=trainer,
        model=trainer.model,
        tokenizer=prepared.tokenizer,
    )


def _final_eval_loss(trainer: SFTTrainer) -> float:
    last = next((record for record in reversed(trainer.state.log_history) if "eval_loss" in record), None)
    if last is not None and last["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return last["eval_loss"]
    return trainer.evaluate()["eval_loss"]


def figures(result: TrainResult) -> dict[str, Any]:
    """The result as `run.json` has it."""
    of_folder = ("output_dir", "wall_clock_s", "trainer", "model", "tokenizer")
    return {item.name: getattr(result, item.name) for item in fields(result) if item.name not in of_folder}


def show_result(result: TrainResult, console: Console) -> None:
    """Draws the result as a table."""
    kept = "" if result.kept_step == result.steps else f", as it was after step {result.kept_step}"
    rows = [
        ("steps", str(result.steps)),
        ("training loss", _number(result.train_loss)),
        ("held-out loss", f"{_number(result.eval_loss_before)} before, {_number(result.eval_loss)} after"),
        ("speed", f"{result.tokens_per_s:.0f} tokens/s"),
        ("peak memory", f"{result.peak_gib:.2f} GiB"),
        ("orthonormality drift", _number(result.orthonormality_drift, "{:.1e}")),
        ("wall clock", f"{result.wall_clock_s:.0f} s"),
        ("adapter", f"{result.output_dir}{kept}"),
        ("records", f"report.html, {records.METRICS}, {records.RUN}, {CURVE}"),
    ]
    console.print(summary_table(rows, title="run finished"))


def since(started: float) -> float:
    """Seconds since a reading of `time.perf_counter()`."""
    return round(time.perf_counter() - started, 2)


def _number(value: float | None, form: str = "{:.4f}") -> str:
    return "not measured" if value is None else form.format(value)
