"""One training run, from a configuration to a saved adapter: what the recipe, the command line and the quickstart call.

Everything that can be wrong with what the user wrote is found before the first write: the output folder, the method's
options, the dataset, the model, the layers that get an adapter, the tokens that are trained. `SFTTrainer` is TRL's own
class; this project enters through `peft_config`, `optimizer_cls_and_kwargs` and `callbacks`.
"""

import errno
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer

from qriemann.adapters.targets import adapter_config, check_targets
from qriemann.base.bars import no_bars_without_terminal
from qriemann.checkpoints.fingerprints import check_same_run, describe_base, fingerprints
from qriemann.checkpoints.manifest import FoundCheckpoint
from qriemann.checkpoints.protect import protect
from qriemann.checkpoints.saving import find_numeric_defect, is_failed_save, save_adapter, save_failed
from qriemann.checkpoints.signals import GracefulStop
from qriemann.checkpoints.starting_point import begin_run, starting_point
from qriemann.checkpoints.step_guard import StepEvent
from qriemann.config.settings import RunConfig
from qriemann.data.chat_mask import adjust_tokenizer
from qriemann.data.defects import find_defects, refuse
from qriemann.data.formats import TokenizedData, fingerprint, trained_token_count
from qriemann.distributed import is_main_process, run_on_main
from qriemann.errors import InputError
from qriemann.folder import records
from qriemann.folder.contents import curve, read_json
from qriemann.folder.lock import hold, refuse_if_held
from qriemann.folder.records import write_run
from qriemann.memory.auto_batch import AutoBatch, BatchFit
from qriemann.memory.dry_run import DryRun
from qriemann.training.assembly import (
    adjust_evaluation,
    build_trainer,
    fit_rate,
    optimizer_arguments,
    read_base,
    read_sources,
    tokenize,
)
from qriemann.training.display import Monitor, PlainView, make_view, summary_table
from qriemann.training.loi_callback import recipe_callbacks
from qriemann.training.publishing import publish, take_over_push

# What a disk that is full or failing raises, whatever was being written.
_DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)


@dataclass
class TrainResult:
    """What came out of a run.

    Attributes:
        output_dir: holds the adapter, its tokenizer, `metrics.jsonl`, `run.json` and `loss.png`.
        train_loss: last logged loss, in nats a token; None if nothing was logged.
        eval_loss_before, eval_loss: held-out loss before the first step and at the end; None without held-out rows.
        tokens_per_s: tokens through the model a second of training, padding excluded, evaluation excluded.
        peak_gib: peak memory, allocated on the GPU or resident on the CPU.
        orthonormality_drift: max |U^T U - I| over the factors at the last log event.
        trainer: still usable, for an evaluation of one's own.
    """

    output_dir: Path
    steps: int
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


def train(
    config: RunConfig,
    *,
    model: PreTrainedModel | PeftModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    instead: Callable[[DryRun, Any], None] | None = None,
) -> TrainResult:
    """Trains an adapter and leaves it, with its records, in the configuration's output folder.

    Args:
        config: from `load_config` or `config_from_values`.
        model: an already loaded base, or one with an adapter to go on with; None loads `model_name_or_path`.
        tokenizer: of that model; required with it.
        train_dataset: rows in any accepted format; None loads `dataset_name`.
        eval_dataset: held-out rows, likewise.
        callbacks: further callbacks of the trainer.
        instead: called with the dry run and the optimizer once all stands and nothing is written; it may end the run.

    Raises:
        InputError: for anything that the user can mend; nothing has been written or overwritten then.
    """
    with _quiet_upstream(), ExitStack() as held:
        run = _Run(config, callbacks, held, instead)
        run.read(model, tokenizer, train_dataset, eval_dataset)
        run.build()
        return run.fit()


class _Run:
    """One run: what was asked for, then what was read and checked, then the trainer.

    With `instead`, defects of the data are left to it and refuse nothing. `described` is what `run.json` says.
    """

    def __init__(
        self,
        config: RunConfig,
        callbacks: Sequence[TrainerCallback],
        held: ExitStack,
        instead: Callable[[DryRun, Any], None] | None,
    ) -> None:
        self.started = time.perf_counter()
        self.config, self.callbacks, self.held, self.instead = config, callbacks, held, instead
        self.folder = Path(config.sft.output_dir)

    def read(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | None,
    ) -> None:
        """Reads and checks all that the run is made of; nothing is written."""
        config, ours = self.config, self.config.qriemann
        self.repository, self.token = take_over_push(config, model)
        self.optimizer = optimizer_arguments(config)
        self.initialize = recipe_callbacks(ours.init, ours.init_kwargs, start=ours.start, alpha=ours.alpha)  # type: ignore[arg-type]
        # Asking for the device is what joins the processes of a launcher.
        self.device = config.sft.device
        run_on_main(lambda: refuse_if_held(self.folder))
        self._starting_point()
        self.view = make_view(ours.display) if is_main_process() else make_view("none", Console(quiet=True))
        with no_bars_without_terminal(self.view.console):
            sources = read_sources(config, train_dataset, eval_dataset)
            self.model, self.tokenizer = read_base(config, model, tokenizer)
            adjust_tokenizer(
                self.tokenizer, eos_token=config.sft.eos_token, chat_template_path=config.sft.chat_template_path
            )
            config.sft.chat_template_path = None
            self.adapter = None if isinstance(self.model, PeftModel) else adapter_config(config.model)
            if self.adapter is not None:
                check_targets(self.model, self.adapter)
            self.data = tokenize(config, sources, self.tokenizer)
        for notice in self.data.notices:
            self.view.note(notice)
        chosen_rate = fit_rate(config, self.optimizer, self.data)
        if chosen_rate is not None:
            self.view.note(chosen_rate)
        self.defects = find_defects(self.data, self.tokenizer, self.model, config.sft.max_length)
        if self.instead is None:
            refuse(self.defects, ours.allow, self.view.note)
        self.prints = fingerprints(config.as_dict(), self.model, fingerprint(self.data.train, self.data.held_out))

    def _starting_point(self) -> FoundCheckpoint:
        ours = self.config.qriemann
        return starting_point(self.folder, resume=ours.resume, overwrite=ours.overwrite, allow=ours.allow)

    def build(self) -> None:
        """Takes the output folder, finds the checkpoint to go on from and makes the trainer."""
        config = self.config
        # Nothing is written before this, and the lock takes with it what an error leaves empty.
        run_on_main(lambda: self.held.enter_context(hold(self.folder)))
        self.found = self._starting_point()
        if self.found.path is not None:
            check_same_run(self.found.path, self.prints, config.qriemann.allow)
        for line in self.found.passed_over:
            self.view.note(f"passed over {line}")
        if config.qriemann.resume is not None:
            self.view.note(f"resuming from {self.found.path or f'the beginning: {self.folder} holds no checkpoint'}")
        adjust_evaluation(config, self.data, resuming=self.found.path is not None)
        self.described = _describe(config, self.model, self.data, self.prints, self.found)
        self.monitor = Monitor(
            self.view,
            self.folder,
            self.device,
            lambda step: begin_run(
                self.folder,
                resume=config.qriemann.resume,
                overwrite=config.qriemann.overwrite,
                step=step,
                described=self.described,
            ),
        )
        self.stop = self.held.enter_context(GracefulStop())
        dry_run = DryRun(config, self.data, self.defects, self.view.note, self.instead)
        callbacks = [dry_run, *self.initialize, self.monitor, self.stop, *self.callbacks]
        with no_bars_without_terminal(self.view.console):
            self.trainer = build_trainer(
                config, self.model, self.tokenizer, self.data, self.adapter, self.optimizer, callbacks
            )
        dry_run.trainer = self.trainer
        self.guard = protect(
            self.trainer,
            max_skipped_steps=config.qriemann.max_skipped_steps,
            run=self.prints,
            on_event=self._tell,
            note=self.view.note,
        )
        if config.qriemann.auto_batch:
            AutoBatch(self.trainer, report=self._keep_fit)

    def fit(self) -> TrainResult:
        """Trains, saves the adapter and writes the records."""
        try:
            self.trainer.train(resume_from_checkpoint=self.found.path and str(self.found.path))
            if not self.stop.saved:
                self._save_adapter()
            self.stop.stop_at_once()
            eval_loss = _final_eval_loss(self.trainer, self.data)
            result = _result(self.trainer, self.monitor, self.folder, eval_loss, self.started, self.tokenizer)
            if self.trainer.is_world_process_zero():
                _finish(result, self._told(), self.view)
        except BaseException as error:
            self._record_failure(error)
            raise
        if self.trainer.is_world_process_zero():
            publish(self.config, self.repository, self.view.console, token=self.token)
        return result

    def _save_adapter(self) -> None:
        defect = find_numeric_defect(self.trainer.model)
        if defect is not None:
            raise InputError(
                f"what is saved must be finite, and factors orthonormal, got {defect} after the last step; no adapter was "
                "saved: lower the learning rate, or look at the rows of the last steps"
            )
        save_adapter(self.trainer, self.folder)

    def _record_failure(self, error: BaseException) -> None:
        """Writes how the run ended, and puts into the user's words what the user can mend."""
        self.view.stop()
        if self.monitor.begun:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}"
            ended = {"status": status, "reason": str(error) or None, "wall_clock_s": _since(self.started)}
            # The disk may be what failed.
            with suppress(OSError):
                write_run(self.folder, {**self._told(), **ended})
        if is_failed_save(error) or (isinstance(error, OSError) and error.errno in _DISK_FAILURES):
            raise save_failed(self.folder, error) from error
        misfit = isinstance(error, RuntimeError | ValueError | LookupError | TypeError)
        if self.found.path is not None and not self.monitor.begun and misfit and not isinstance(error, InputError):
            raise InputError(
                f"resume must be a checkpoint that fits this model and method, got {self.found.path}: {error}; name another"
            ) from error

    def _tell(self, event: StepEvent) -> None:
        if is_main_process():
            self.view.note(str(event))
            records.append_metrics(self.folder, event.as_record())
            write_run(self.folder, self._told())

    def _told(self) -> dict[str, Any]:
        """What `run.json` says, with what happened so far."""
        events = [event for event in records.read_metrics(self.folder) if "skipped" in event or "spike" in event]
        taken = {
            "done": self.trainer.state.global_step,
            "skipped": self.guard.skipped_steps,
            "spikes": self.guard.spikes,
        }
        return {**self.described, "steps": {**taken, "events": events}}

    def _keep_fit(self, fit: BatchFit) -> None:
        self.view.note(str(fit))
        self.described["auto_batch"] = asdict(fit)
        if self.monitor.begun:
            write_run(self.folder, self._told())


@contextmanager
def _quiet_upstream() -> Iterator[None]:
    """Hides the warnings of a run that say nothing about it and that nobody can act on."""
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        # At every save PEFT asks the Hub whether the vocabulary was resized, which nothing here does.
        for message in ("Unable to fetch remote file", "Could not find a config file in"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def _describe(
    config: RunConfig, model: Any, data: TokenizedData, prints: dict[str, Any], found: FoundCheckpoint
) -> dict[str, Any]:
    held_out = data.held_out
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "resumed_from": found.path and str(found.path),
        "passed_over": found.passed_over,
        "earlier": _earlier(Path(config.sft.output_dir)) if config.qriemann.resume else [],
        "seed": config.sft.seed,
        "written": sorted(config.explicit),
        "data": {
            "fingerprint": prints["data"],
            "format": data.row_format,
            "train_rows": len(data.train),
            "trained_tokens": trained_token_count(data.train),
            "held_out_rows": 0 if held_out is None else len(held_out),
            "notices": data.notices,
        },
        **records.environment(config.sft.device),
        "model": {
            "name_or_path": model.config._name_or_path,
            "parameters": model.num_parameters(),
            **describe_base(model, prints["base"]),
        },
        "config": config.as_dict(),
    }


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """How the processes ended that trained in the folder before, oldest first."""
    before = read_json(folder / records.RUN)
    told = before.get("earlier")
    last = {key: before.get(key) for key in ("started_at", "resumed_from", "status", "reason", "wall_clock_s")}
    return [*(told if isinstance(told, list) else []), last] if before else []


def _final_eval_loss(trainer: SFTTrainer, data: TokenizedData) -> float | None:
    if data.held_out is None:
        return None
    last = next((record for record in reversed(trainer.state.log_history) if "eval_loss" in record), None)
    if last is not None and last["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return last["eval_loss"]
    return trainer.evaluate()["eval_loss"]


def _result(
    trainer: SFTTrainer,
    monitor: Monitor,
    folder: Path,
    eval_loss: float | None,
    started: float,
    tokenizer: PreTrainedTokenizerBase,
) -> TrainResult:
    losses = curve(monitor.records, "loss")
    before = next((value for step, value in curve(monitor.records, "eval_loss") if step == 0), None)
    drifts = curve(monitor.records, "orthonormality_drift")
    return TrainResult(
        output_dir=folder,
        steps=trainer.state.global_step,
        train_loss=losses[-1][1] if losses else None,
        eval_loss_before=before,
        eval_loss=eval_loss,
        tokens_per_s=monitor.tokens_per_s,
        peak_gib=records.peak_gib(trainer.args.device),
        orthonormality_drift=drifts[-1][1] if drifts else None,
        wall_clock_s=_since(started),
        trainer=trainer,
        model=trainer.model,
        tokenizer=tokenizer,
    )


def _finish(result: TrainResult, described: dict[str, Any], view: PlainView) -> None:
    figures = {
        "steps": result.steps,
        "train_loss": result.train_loss,
        "eval_loss_before": result.eval_loss_before,
        "eval_loss": result.eval_loss,
        "tokens_per_s": round(result.tokens_per_s, 1),
        "peak_gib": round(result.peak_gib, 3),
        "orthonormality_drift": result.orthonormality_drift,
    }
    folder = result.output_dir
    records.plot_losses(folder / records.PLOT, records.read_metrics(folder))
    write_run(folder, {**described, "status": "finished", "wall_clock_s": result.wall_clock_s, "result": figures})
    rows = [
        ("steps", str(result.steps)),
        ("training loss", _number(result.train_loss)),
        ("held-out loss", f"{_number(result.eval_loss_before)} before, {_number(result.eval_loss)} after"),
        ("speed", f"{result.tokens_per_s:.0f} tokens/s"),
        ("peak memory", f"{result.peak_gib:.2f} GiB"),
        ("orthonormality drift", _number(result.orthonormality_drift, "{:.1e}")),
        ("wall clock", f"{result.wall_clock_s:.0f} s"),
        ("adapter", str(folder)),
        ("records", f"report.html, {records.METRICS}, {records.RUN}, {records.PLOT}"),
    ]
    if described["config"]["display"] != "none":
        view.console.print(summary_table(rows, title="run finished"))


def _number(value: float | None, form: str = "{:.4f}") -> str:
    return "not measured" if value is None else form.format(value)


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
