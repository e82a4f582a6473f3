"""The longest batch, taken through the model before the first step: what will not fit or mixes samples is known at once.

Nothing is left behind: gradients, random numbers and the trainer's counters are as they were, so that a run goes the same
way, bit for bit, with and without it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qriemann.adapters.loi import preserved_rng
from qriemann.config.settings import RunConfig
from qriemann.data.defects import Defect, refuse
from qriemann.data.formats import TokenizedData
from qriemann.errors import InputError
from qriemann.folder.records import peak_gib
from qriemann.memory.live_bytes import LiveBytes, adapter_tensors

# Tokens a sample of the packed pair: enough to see the other, cheap to compute.
_PROBE_TOKENS = 32
# A sample that does not see the other one has the same logits to rounding; one that does, others.
_PROBE_RTOL = 1e-2


@dataclass(frozen=True)
class Measured:
    """One batch taken through the model.

    Attributes:
        rows, tokens: of the batch, and of its longest row, padding included.
        seconds: wall clock.
        peak_gib: of the process so far: allocated on a GPU, resident on a CPU.
        counted: bytes that lived at once beyond what was there before; None where they were not counted.
    """

    rows: int
    tokens: int
    seconds: float
    peak_gib: float
    counted: int | None


class DryRun(TrainerCallback):
    """Takes the longest batches through the model when training begins.

    Args:
        config: of the run.
        data: as it was made, before the trainer truncates and packs it.
        defects: of the data.
        note: takes a line for the reader.
        instead: called with this object and the optimizer in place of the dry run.

    Attributes:
        trainer: to be set once it stands.
    """

    def __init__(
        self,
        config: RunConfig,
        data: TokenizedData,
        defects: list[Defect],
        note: Callable[[str], None],
        instead: Callable[[DryRun, Any], None] | None = None,
    ) -> None:
        self.config, self.data, self.defects, self.note, self.instead = config, data, defects, note, instead
        self.trainer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.instead is not None:
            self.instead(self, kwargs["optimizer"])
        if not self.config.qriemann.dry_run:
            return
        defects = self.mixed_samples()
        # auto_batch measures by itself.
        if not self.config.qriemann.auto_batch:
            measured = self.training_batch()
            self.note(
                f"dry run: the longest batch, {measured.rows} rows of up to {measured.tokens} tokens, took "
                f"{measured.seconds:.1f} s, peak {measured.peak_gib:.2f} GiB"
            )
        # On a CPU nothing says beforehand that memory is short, and an evaluation is slow.
        if args.device.type == "cuda" and self.trainer.eval_dataset is not None:
            defects += self.evaluation_batch()[1]
        refuse(defects, self.config.qriemann.allow, self.note)

    def training_batch(self, *, counted: bool = False, keep_gradients: bool = False) -> Measured:
        """Forward and backward of the longest rows.

        Args:
            counted: count the bytes of what is computed, which takes time.
            keep_gradients: leave them where they are.

        Raises:
            InputError: they do not fit.
        """
        trainer = self.trainer
        rows = longest_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size)

        def run(inputs: dict[str, Any]) -> None:
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(trainer.model_wrapped, inputs)

        try:
            return self._measure(rows, run, counted, keep_gradients)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"per_device_train_batch_size must be one at which the longest batch fits, got {len(rows)} rows of up to "
                f"{max(len(row['input_ids']) for row in rows)} tokens, which do not; lower it and raise "
                "gradient_accumulation_steps, set activation_checkpointing: true, or lower max_length"
            ) from error

    def evaluation_batch(self, *, counted: bool = False) -> tuple[Measured | None, list[Defect]]:
        """The longest held-out rows, and the defect that they do not fit."""
        trainer = self.trainer
        rows = longest_rows(trainer.eval_dataset, trainer.args.per_device_eval_batch_size)

        def run(inputs: dict[str, Any]) -> None:
            trainer.model.eval()
            trainer.prediction_step(trainer.model_wrapped, inputs, prediction_loss_only=True)

        try:
            return self._measure(rows, run, counted), []
        except torch.OutOfMemoryError:
            return None, [too_large_evaluation(len(rows), "it runs out of memory")]

    def _measure(
        self,
        rows: list[dict[str, Any]],
        run: Callable[[dict[str, Any]], None],
        counted: bool,
        keep_gradients: bool = False,
    ) -> Measured:
        trainer, model = self.trainer, self.trainer.model
        inputs = trainer.data_collator(rows)
        counter = LiveBytes([*model.parameters(), *model.buffers(), *adapter_tensors(model)]) if counted else None
        with _left_as_it_was(trainer, keep_gradients=keep_gradients):
            started = time.perf_counter()
            if counter is None:
                run(inputs)
            else:
                with counter:
                    run(inputs)
            if trainer.args.device.type == "cuda":
                torch.cuda.synchronize(trainer.args.device)
            seconds = time.perf_counter() - started
        return Measured(
            rows=len(rows),
            tokens=inputs["input_ids"].shape[1],
            seconds=seconds,
            peak_gib=peak_gib(trainer.args.device),
            counted=None if counter is None else sum(counter.peaks[counter.window].values()),
        )

    def mixed_samples(self) -> list[Defect]:
        """The defect that a packed sample sees the one before it, which is tried out with two short ones."""
        trainer = self.trainer
        if not (trainer.args.packing or trainer.padding_free):
            return []
        first, second = (self.data.train[index % len(self.data.train)]["input_ids"][:_PROBE_TOKENS] for index in (0, 1))
        vocabulary = trainer.model.get_input_embeddings().weight.shape[0]
        other = [(token + 1) % vocabulary for token in first]
        with _left_as_it_was(trainer), torch.no_grad():
            trainer.model.eval()
            with trainer.compute_loss_context_manager():
                logits = [self._second_logits(sample, second) for sample in (first, other)]
        if (logits[0] - logits[1]).norm() <= _PROBE_RTOL * logits[0].norm():
            return []
        attention = trainer.model.config._attn_implementation
        return [
            Defect(
                "packing-mixes-samples",
                "packed samples must not see each other",
                f"a sample that another one before it changes (attention {attention}, packing_strategy "
                f"{trainer.args.packing_strategy})",
                "set packing_strategy: bfd with attn_implementation: sdpa or flash_attention_2, or packing: false",
                error=True,
            )
        ]

    def _second_logits(self, first: list[int], second: list[int]) -> Tensor:
        """The logits at the second of two samples in one row, as the trainer's collator lays them out."""
        trainer = self.trainer
        row: dict[str, Any] = {"input_ids": first + second, "labels": first + second}
        if "seq_lengths" in trainer.train_dataset.column_names:
            row["seq_lengths"] = [len(first), len(second)]
        rows = [row] if trainer.args.packing else [{"input_ids": ids, "labels": ids} for ids in (first, second)]
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        del inputs["labels"]
        return trainer.model(**inputs, use_cache=False).logits[0, len(first) :].float()


def too_large_evaluation(rows: int, found: str) -> Defect:
    """The defect that an evaluation will not fit."""
    return Defect(
        "evaluation-too-large",
        f"an evaluation batch of the {rows} longest held-out rows must fit beside the training",
        found,
        "lower per_device_eval_batch_size",
        error=True,
    )


def longest_rows(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """The rows of most tokens, as many as there are up to `count`."""
    lengths = [len(ids) for batch in dataset.select_columns("input_ids").iter(1000) for ids in batch["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [dataset[index] for index in order[:count]]


@contextmanager
def _left_as_it_was(trainer: Any, *, keep_gradients: bool = False) -> Iterator[None]:
    """Undoes what a batch leaves: random numbers, gradients, train mode, and what a TRL trainer counts."""
    counts = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    training = [(module, module.training) for module in trainer.model.modules()]
    try:
        with preserved_rng():
            yield
    finally:
        trainer._metrics, trainer._total_train_tokens = counts
        for module, mode in training:
            module.training = mode
        if not keep_gradients:
            trainer.model.zero_grad(set_to_none=True)
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()
