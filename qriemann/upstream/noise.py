"""Output of other libraries: pointless warnings and log lines, progress bars, telemetry."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Warnings about what neither a user nor this project can change, by the start of their text.
_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # PEFT 0.21 reads an attribute that transformers 5.23 renamed; goes when `pytest tests/adapters` passes without the same
    # filter in pyproject.toml.
    (".is_gradient_checkpointing. is deprecated", FutureWarning),
    # At every save PEFT looks for the base's configuration on the Hub, to learn whether the vocabulary has grown; goes when
    # tests/training/test_run.py passes without it.
    ("Unable to fetch remote file", UserWarning),
    ("Could not find a config file in", UserWarning),
    # PEFT warns of a base with tied embeddings, which the commands that read an adapter untie, and of what it sets by itself
    # for a Conv1D. Both go when tests/release/test_kinds.py passes without them.
    ("Model has `tie_word_embeddings=True`", UserWarning),
    ("fan_in_fan_out is set to", UserWarning),
    # PEFT warns of trained biases when an adapter is disabled; the evaluation puts the base's own back. Goes when
    # tests/release passes without it.
    ("Careful, disabling adapter layers", UserWarning),
    # `SavedAdapter.put_on` refuses them by name.
    ("Found missing adapter keys", UserWarning),
    # PEFT warns of every adapter on a tied layer; what of them cannot be merged or read later is refused by name.
    ("Model has `tie_word_embeddings=True` and a tied layer is part", UserWarning),
)


# Log lines of the same kind: the logger, and words of the line.
_NOTICES = (
    # bitsandbytes 0.50, imported on a CPU with AVX512-BF16: it looks on the Hub for a kernel that nothing here uses.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    # A table of the tensors that a model's files lack or have too many; `check_loaded` names those that matter.
    ("transformers.modeling_utils", "LOAD REPORT"),
    # A share of the steps against the steps it came to, and what a resumed run takes from its settings anyway.
    ("transformers.trainer_utils", "The following arguments do not match the ones"),
    # `find_best_again` finds it, or says so.
    ("transformers.trainer", "recorded in the resumed state does not"),
    # Of the base's own generation_config.json.
    ("transformers.generation.configuration_utils", "The following generation flags are not valid"),
    # A card without a heading of its own gets one.
    ("huggingface_hub.repocard", "Repo card metadata block was not found"),
    # What datasets does about a number of processes that is too large.
    ("datasets.builder", "Setting num_proc from"),
    ("datasets.arrow_dataset", "num_proc must be <="),
    ("datasets.arrow_dataset", "Setting TOKENIZERS_PARALLELISM=false"),
)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, an attribute of a module or class has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def quiet(*, bars: bool | None = None) -> Iterator[None]:
    """Hides upstream's progress bars where the output is no terminal, and warnings that a user cannot act on.

    A bar redraws itself with control characters, which a log keeps. datasets, transformers, TRL and huggingface_hub each
    have a switch of their own; all draw with tqdm, so one switch there serves libraries that are imported later as well.
    """
    with warnings.catch_warnings():
        for message, category in _WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        # They stay hidden after the block: a library may be imported only then. The same filter is added once.
        for logger in {name for name, _ in _NOTICES}:
            logging.getLogger(logger).addFilter(_says_something)
        if sys.stderr.isatty() if bars is None else bars:
            yield
            return
        from tqdm.std import tqdm

        draw = tqdm.__init__

        @functools.wraps(draw)
        def hidden(self: Any, *args: Any, **options: Any) -> None:
            draw(self, *args, **options | {"disable": True})

        with replaced(tqdm, "__init__", hidden):
            yield


def _says_something(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(record.name == name and words in message for name, words in _NOTICES)


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Within the block, TRL's trainers send no telemetry unless HF_HUB_DISABLE_TELEMETRY is set to 0.

    TRL sends the kind of trainer, model, GPU and data source to a server of its own for each trainer that it makes;
    tests/training/test_reporting.py
    """
    from trl.trainer import base_trainer

    wanted = os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1").upper() in ("0", "OFF", "NO", "FALSE")
    with replaced(base_trainer, "send_telemetry", base_trainer.send_telemetry if wanted else lambda **_: None):
        yield
