"""A sample of a trainer's batches for what looks at the data before the first step, and the loss on one of them."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from qriemann.adapters.loi import own_loss
from qriemann.errors import InputError


def draw_batches(loader: DataLoader, count: int, batch_size: int, seed: int) -> list[Any]:
    """At most `count` batches, from a loader of their own: iterating over the trainer's would move its samplers on."""
    dataset: Any = getattr(loader, "dataset", None)
    if dataset is None:
        raise InputError(
            f"the data must come from a torch DataLoader, got {type(loader).__name__}, to be looked at before training"
        )
    if isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset):
        raise InputError(
            "the training data is an iterator that can be read once, and what is looked at before would be missing from it"
        )
    own = DataLoader(
        dataset,
        # Without a size and without a sampler of batches, the dataset's items are batches.
        None if loader.batch_size is None and loader.batch_sampler is None else batch_size,
        # The sampler that shuffles refuses an empty dataset in words of its own.
        shuffle=not isinstance(dataset, IterableDataset) and len(dataset) > 0,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=loader.collate_fn,
    )
    return list(itertools.islice(own, count))


def lean_loss(model: Any, batch: Any) -> Tensor:
    """The loss that `model(**batch)` returns, as a training step computes it.

    TRL gives a causal language model's forward a switch, by which the logits of the whole vocabulary are never there at once.
    """
    forward = getattr(getattr(model, "get_base_model", lambda: model)(), "forward", None)
    if "fused_lm_head" in getattr(getattr(forward, "__code__", None), "co_varnames", ()) and "labels" in batch:
        batch = {**batch, "fused_lm_head": True}
    return own_loss(model, batch)
