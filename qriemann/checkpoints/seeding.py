"""Makes what a step sees a function of seed and step: its random numbers, and the rows of its batches.

The trainer restores the generators' state when it resumes, which is exact only while nothing else draws from them: an
evaluation, a callback, a sampler. Seeded anew at every step, a step draws the same numbers in every process that reaches it.
"""

import copy
import hashlib
import math
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import DataLoader, get_worker_info


def seed_generators(seed: int, step: int, process: int = 0) -> None:
    """Seeds Python's, NumPy's and torch's generators, on all devices, for one step."""
    _seed_all(_derived(seed, "step", step, process))


def pin_epoch(dataloader: DataLoader, seed: int, epoch: int, step: int, accumulation: int, process: int = 0) -> None:
    """Makes the order of an epoch's rows a function of seed and epoch, and what a collator draws one of the batch as well.

    The loader collates each batch ahead of its step, so the next step's first batch exists before this step ends.

    Args:
        dataloader: of the training, before the epoch is iterated. Workers that outlive an epoch (persistent_workers) miss
            the next one's seed.
    """
    _pin(_sampler(dataloader), seed, epoch)
    # A stream is read from the start again on resume, so its batches count from 0.
    batches = 0 if _sampler(dataloader) is None else len(dataloader)
    first = step % math.ceil(batches / accumulation) * accumulation if batches else 0
    # accelerate iterates over the loader that it wraps.
    inner: Any = getattr(dataloader, "base_dataloader", dataloader)
    collate = inner.collate_fn.collate if isinstance(inner.collate_fn, _SeededCollator) else inner.collate_fn
    inner.collate_fn = _SeededCollator(collate, (seed, "batch", epoch, process), first)


def rows_of_step(dataloader: DataLoader, seed: int, step: int, accumulation: int) -> list[int]:
    """The indices of the training rows whose gradients an optimizer step sums; empty for a stream."""
    if _sampler(dataloader) is None:
        return []
    steps = math.ceil(len(dataloader) / accumulation)
    # The processes take batches in turn.
    batches = accumulation * getattr(dataloader.batch_sampler, "num_processes", 1)
    epoch, first = step // steps, step % steps * batches
    # Copies, because the iteration in progress must not notice.
    batch_sampler = copy.copy(_whole_batch_sampler(dataloader))
    batch_sampler.sampler = copy.copy(_sampler(dataloader))
    _pin(batch_sampler.sampler, seed, epoch)
    return [row for batch in islice(batch_sampler, first, first + batches) for row in batch]


class _SeededCollator:
    """Seeds the generators before each batch, in every worker."""

    def __init__(self, collate: Callable[[list[Any]], Any], seed: tuple[object, ...], first: int) -> None:
        self.collate, self._seed, self._first = collate, seed, first
        self._made = 0

    def __call__(self, rows: list[Any]) -> Any:
        worker = get_worker_info()
        # Worker w of W collates batches w, w + W, ...
        place = self._made if worker is None else self._made * worker.num_workers + worker.id
        _seed_all(_derived(*self._seed, self._first + place))
        self._made += 1
        return self.collate(rows)


def _sampler(dataloader: DataLoader) -> Any:
    """The sampler of rows under the batches; None for a stream of rows."""
    return getattr(_whole_batch_sampler(dataloader), "sampler", None)


def _whole_batch_sampler(dataloader: DataLoader) -> Any:
    """The sampler of the batches of all processes, of which each takes its share."""
    batch_sampler: Any = getattr(dataloader, "batch_sampler", None)
    return batch_sampler.batch_sampler if isinstance(batch_sampler, BatchSamplerShard) else batch_sampler


def _pin(sampler: Any, seed: int, epoch: int) -> None:
    if isinstance(sampler, SeedableRandomSampler):
        # accelerate seeds it with whatever torch was seeded with last. Without a generator, it makes its own.
        sampler.initial_seed, sampler.generator = seed, None
        sampler.set_epoch(epoch)
    elif hasattr(sampler, "generator"):
        sampler.generator = torch.Generator().manual_seed(_derived(seed, "epoch", epoch))


def _seed_all(value: int) -> None:
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def _derived(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])
