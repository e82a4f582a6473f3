"""From settings to everything that a run is made of, read and checked; nothing is written."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from qriemann.adapters.attach import load_base
from qriemann.adapters.targets import adapter_config, check_targets, without_experts
from qriemann.base.chat_template import adjust_tokenizer
from qriemann.checkpoints.fingerprints import check_same_run, fingerprints
from qriemann.checkpoints.manifest import FoundCheckpoint
from qriemann.checkpoints.starting_point import OutputFolder, look_at_output
from qriemann.config import Settings
from qriemann.config.arguments import (
    check_schedule,
    describe_settings,
    idle_without_rows,
    run_dtype,
    training_arguments,
)
from qriemann.data.account import Account, take_account
from qriemann.data.defects import Defect, find_defects
from qriemann.data.row_formats import RowEncoder
from qriemann.data.sources import Source, load_sources
from qriemann.data.tokenized import TokenizedData, fingerprint, tokenize_rows
from qriemann.device import compute_device, describe_device, keep_freed_memory, refuse_unused_gpu
from qriemann.errors import InputError
from qriemann.memory.dry_run import much_padding, packing_mask
from qriemann.optim.methods import find_method
from qriemann.training.display import PlainView, make_view
from qriemann.training.loi_callback import recipe_callbacks
from qriemann.training.rate_callback import MeasuredRate
from qriemann.training.rows_page import describe_rows
from qriemann.training.seam import for_trainer
from qriemann.upstream import attention_of, quiet, take_one_gpu

if TYPE_CHECKING:
    from qriemann.base.dense_weights import DenseWeights


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be checked or trained.

    Attributes:
        settings: as they were given.
        described: every setting, credentials redacted, for the run's record.
        output: the folder that the run writes into; None where a check alone was wanted.
        args: the trainer's arguments, fitted to the data: the learning rate, and when to evaluate.
        model: the base in its storage format, or a model that came with an adapter.
        tokenizer: with the chat template and the end token that the run uses.
        dense: the dequantized copies that a CPU computes with; None where there are none to hold.
        adapter: the configuration of the new adapter; None where the model came with one.
        data: tokens and labels, held-out rows split off.
        account: of all rows, as they will be trained.
        optimizer: the value of TRL's `optimizer_cls_and_kwargs`.
        initialization: the callbacks that choose the adapter's start and measure the rate, if the settings ask for any.
        defects: what is wrong with the tokens; errors among them stop a training.
        rows: counts and a sample for the page and the report, from `describe_rows`.
        fingerprints: of settings, tokens and base, which a run that goes on from a checkpoint must share.
        found: the checkpoint to go on from, if there is one.
        push_to: the Hub repository for the adapter at the end; None for none.
        started: `time.perf_counter()` when the preparation began.
    """

    settings: Settings
    described: dict[str, Any]
    output: OutputFolder | None
    args: SFTConfig
    model: Any
    tokenizer: PreTrainedTokenizerBase
    dense: DenseWeights | None
    adapter: LoraConfig | None
    data: TokenizedData
    account: Account
    optimizer: tuple[type, dict[str, Any]]
    initialization: tuple[TrainerCallback, ...]
    defects: tuple[Defect, ...]
    rows: dict[str, Any]
    fingerprints: dict[str, Any]
    found: FoundCheckpoint
    push_to: str | None
    started: float


def prepare(
    settings: Settings,
    *,
    model: PreTrainedModel | PeftModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    output: OutputFolder | None = None,
    view: PlainView | None = None,
    to_train: bool = True,
) -> Prepared:
    """Reads and checks everything that a run is made of; writes nothing.

    Args:
        settings: from `load_settings` or `settings_from`.
        model: an already loaded base, or one with an adapter to go on with; None loads `model_name_or_path`.
        tokenizer: of that model; required with it.
        train_dataset: rows in any accepted format; None loads `dataset_name`.
        eval_dataset: held-out rows, likewise.
        output: from `look_at_output`, for a caller that has looked already; None looks first.
        view: where progress and notices go; None makes the one that the settings name.
        to_train: False leaves the output folder out of it: a check may look at a run whose folder is in use.

    Raises:
        InputError: for anything that the user can fix.
    """
    started = time.perf_counter()
    view = view or make_view(settings.display)
    if to_train:
        output = output or look_at_output(settings)
    with quiet(bars=view.console.is_terminal):
        if not settings.use_cpu:
            refuse_unused_gpu()
        args = training_arguments(settings)
        push_to = _push_target(settings, model)
        optimizer = _optimizer(settings, args)
        check_schedule(args, optimizer[1]["lr"])
        initialization = recipe_callbacks(settings.init, settings.init_kwargs)
        measured = [MeasuredRate(note=view.note)] if settings.measures_rate else []
        # Asking for the device is what joins the processes of a launcher.
        device = args.device
        take_one_gpu(args)
        view.note(f"computing on {describe_device(device, run_dtype(settings, device))}")
        if device.type == "cpu":
            keep_freed_memory()
        found = FoundCheckpoint(None) if output is None else output.find_checkpoint(settings.allow)
        with view.doing("reading the rows"):
            sources = _read_rows(settings, train_dataset, eval_dataset)
        loads = model is None and settings.model_name_or_path
        with view.doing(f"loading {loads} on {device.type}") if loads else nullcontext():
            model, tokenizer = _read_base(settings, model, tokenizer)
        dense = None
        if getattr(model, "is_loaded_in_4bit", False):
            from qriemann.base.dense_weights import hold_dense

            # Reports the copies `load_base` made, and makes those still missing (a model passed in, or memory freed since).
            dense = hold_dense(model)
        adjust_tokenizer(tokenizer, eos_token=args.eos_token, chat_template_path=settings.trl.get("chat_template_path"))
        offset = settings.start == "offset" and find_method(settings.method).on_manifold
        adapter = None if isinstance(model, PeftModel) else adapter_config(settings, offset=offset)
        experts = None
        if adapter is not None:
            adapter, experts = without_experts(model, adapter)
            check_targets(model, adapter)
        with view.doing("tokenizing and fingerprinting the rows"):
            data = _tokenize(settings, args, sources, tokenizer)
            account = take_account(data, tokenizer, model, args.max_length)
            defects = find_defects(account, tokenizer)
            encoder = RowEncoder(tokenizer, settings.loss_on, args.dataset_text_field)
            rows = describe_rows(sources[0], data, account, encoder, tokenizer, args.max_length)
            defects += [*packing_mask(args, attention_of(model.config)), *much_padding(args, account.train.lengths)]
            data_print = fingerprint(data.train, data.held_out)
        idle = idle_without_rows(args) if data.held_out is None else None
        for notice in (dense, experts, *data.notices, idle):
            if notice is not None:
                view.note(str(notice))
        args = _fitted_arguments(args, optimizer[1]["lr"], data, resuming=found.path is not None)
        described = describe_settings(settings, args)
        prints = fingerprints(described, model, data_print)
    if found.path is not None:
        for change in check_same_run(found.path, prints, settings.allow):
            view.note(f"going on with {change}")
    return Prepared(
        settings=settings,
        described=described,
        output=output,
        args=args,
        model=model,
        tokenizer=tokenizer,
        dense=dense,
        adapter=adapter,
        data=data,
        account=account,
        optimizer=optimizer,
        initialization=(*initialization, *measured),
        defects=tuple(defects),
        rows=rows,
        fingerprints=prints,
        found=found,
        push_to=push_to,
        started=started,
    )


def _push_target(settings: Settings, model: Any) -> str | None:
    """The repository to push to at the end; None for none."""
    trl = settings.trl
    repository = settings.push
    if repository is None and trl.get("push_to_hub"):
        repository = trl.get("hub_model_id") or Path(settings.output_dir).name
    if repository is not None:
        from qriemann.release.push import check_push

        base = settings.model_name_or_path if model is None else model.name_or_path
        check_push(repository, base or "", settings.hub_base_id)
    return repository


def _read_rows(
    settings: Settings, train_dataset: Dataset | None, eval_dataset: Dataset | None
) -> tuple[Source, Source | None]:
    """The training rows and the held-out rows, if there are any of their own."""
    if train_dataset is not None:
        if len(train_dataset) == 0 or (eval_dataset is not None and len(eval_dataset) == 0):
            raise InputError("train_dataset and eval_dataset must hold at least one row each, got an empty one")
        train = Source(train_dataset, "train_dataset")
        held_out = None if eval_dataset is None else Source(eval_dataset, "eval_dataset")
    else:
        train, held_out = load_sources(
            settings.named("dataset_name"),
            config=settings.dataset_config,
            train_split=settings.dataset_train_split,
            test_split=settings.dataset_test_split,
            eval_name=settings.dataset_eval_name,
            columns=settings.dataset_columns,
        )
    return train.first(settings.max_train_rows), held_out and held_out.first(settings.max_eval_rows)


def _read_base(
    settings: Settings, model: Any, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model and its tokenizer: those that were given, or those that the settings name."""
    if model is not None:
        if tokenizer is None:
            raise InputError("tokenizer must come with the model, got a model alone; pass both")
        return model, tokenizer
    device = compute_device("cpu" if settings.use_cpu else None)
    return load_base(
        settings.named("model_name_or_path"),
        quantize=None if settings.quantize == "none" else "nf4",
        dtype=run_dtype(settings, device),
        device=device,
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
        attn_implementation=settings.attn_implementation,
        allow_pickle="pickle" in settings.allow,
        offload_embeddings=settings.offload_embeddings,
    )


def _tokenize(
    settings: Settings, args: SFTConfig, sources: tuple[Source, Source | None], tokenizer: PreTrainedTokenizerBase
) -> TokenizedData:
    """The tokens and labels of all rows, held-out rows split off where the settings ask for an evaluation."""
    train, held_out = sources
    evaluated = args.eval_strategy != IntervalStrategy.NO
    data = tokenize_rows(
        train,
        held_out if evaluated else None,
        tokenizer,
        loss_on=settings.loss_on,
        text_field=args.dataset_text_field,
        max_length=args.max_length,
        eval_size=settings.eval_size if evaluated and len(train.rows) > 1 else 0.0,
        seed=args.seed,
        num_proc=args.dataset_num_proc,
        max_held_out=settings.max_eval_rows,
        allow=settings.allow,
    )
    if data.held_out is None and evaluated and "eval_strategy" in settings.written:
        raise InputError(
            f"eval_strategy {args.eval_strategy.value} needs held-out rows: set eval_size, or else eval_strategy: no"
        )
    return data


def _optimizer(settings: Settings, args: SFTConfig) -> tuple[type, dict[str, Any]]:
    written = settings.written
    options: dict[str, Any] = {
        "lr": args.learning_rate if "learning_rate" in written and not settings.measures_rate else None,
        "momentum": settings.momentum,
        "weight_decay": args.weight_decay if "weight_decay" in written else None,
        "start": settings.start if "start" in written else None,
        "alpha": settings.alpha if "alpha" in written else None,
        **(settings.method_kwargs or {}),
    }
    if find_method(settings.method).on_manifold:
        options.setdefault("seed", args.seed)
    return for_trainer(settings.method, **options)


def _fitted_arguments(args: SFTConfig, rate: float, data: TokenizedData, *, resuming: bool) -> SFTConfig:
    """A copy of the arguments that fits the data."""
    fitted = copy.copy(args)
    # The trainer takes the rate from the optimizer; this is for its records and loggers.
    fitted.learning_rate = rate
    if data.held_out is None:
        fitted.eval_strategy = IntervalStrategy.NO
    # A resumed run skips eval_on_start; the original run logged that loss.
    if resuming or fitted.eval_strategy == IntervalStrategy.NO:
        fitted.eval_on_start = False
    return fitted
