"""What a step sees is a function of the seed and the step: its random numbers, and the rows of its batches.

The trainer restores the state of the generators when it resumes. That is exact only while nothing else draws from them in
between: an evaluation at the end of an epoch, a sampler whose permutation depends on the state at the epoch's start, a
callback. Seeded anew at every step, a step draws the same numbers in every process that reaches it.
"""

import copy
import hashlib
import math
import random
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import DataLoader


def seed_generators(seed: int, step: int, process: int = 0) -> None:
    """Seeds Python's, NumPy's and torch's generators, on all devices, for one step."""
    value = _derived(seed, "step", step, process)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def pin_order(dataloader: DataLoader, seed: int, epoch: int) -> None:
    """Makes the order of an epoch's rows a function of seed and epoch; to be called before the epoch is iterated."""
    sampler = _sampler(dataloader)
    if isinstance(sampler, SeedableRandomSampler):
        # accelerate takes whatever torch was seeded with last, which is the trainer's seed in a process that only trains.
        sampler.initial_seed = seed
    elif hasattr(sampler, "generator"):
        sampler.generator = torch.Generator().manual_seed(_derived(seed, "epoch", epoch))


def rows_of_step(dataloader: DataLoader, seed: int, step: int, accumulation: int) -> list[int]:
    """The indices of the training rows whose gradients an optimizer step sums; empty where the dataset has none.

    Args:
        dataloader: of the training.
        seed: as for `pin_order`.
        step: optimizer steps before this one.
        accumulation: batches a step.
    """
    if _sampler(dataloader) is None:
        return []
    steps = math.ceil(len(dataloader) / accumulation)
    # The processes take batches in turn.
    batches = accumulation * getattr(dataloader.batch_sampler, "num_processes", 1)
    epoch, first = step // steps, step % steps * batches
    # Copies, because the iteration in progress must not notice.
    batch_sampler = copy.copy(_whole_batch_sampler(dataloader))
    sampler = batch_sampler.sampler = copy.copy(_sampler(dataloader))
    if isinstance(sampler, SeedableRandomSampler):
        sampler.generator = None
        sampler.set_epoch(epoch)
    elif hasattr(sampler, "generator"):
        sampler.generator = torch.Generator().manual_seed(_derived(seed, "epoch", epoch))
    return [row for batch in islice(batch_sampler, first, first + batches) for row in batch]


def _sampler(dataloader: DataLoader) -> Any:
    """The sampler of rows under the batches; None for a stream of rows."""
    return getattr(_whole_batch_sampler(dataloader), "sampler", None)


def _whole_batch_sampler(dataloader: DataLoader) -> Any:
    """The sampler of the batches of all processes, of which each takes its share."""
    batch_sampler: Any = getattr(dataloader, "batch_sampler", None)
    return batch_sampler.batch_sampler if isinstance(batch_sampler, BatchSamplerShard) else batch_sampler


def _derived(*parts: object) -> int:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7])
