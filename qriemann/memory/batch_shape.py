"""What the shape of a batch costs: tokens of padding, and the mask that keeps packed rows apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from trl import SFTConfig

from qriemann.data.defects import Defect
from qriemann.memory.live_bytes import GIB

# Tokens of a packed batch from which its mask is worth a line: 0.1 GiB in half precision.
_LONG_ROW = 8192
# Share of padding that is worth a line; the quickstart's rows have 5 % in batches of 8, sums of numbers 17 %.
_MUCH_PADDING = 0.25


def padding_share(lengths: Sequence[int], rows: int) -> float:
    """The share of a batch's tokens that is padding, over batches of that many rows in one random order."""
    order = np.random.default_rng(0).permutation(np.asarray(lengths))
    batches = np.array_split(order, range(rows, len(order), rows))
    return 1 - order.sum() / sum(batch.max() * len(batch) for batch in batches)


def much_padding(args: SFTConfig, lengths: Sequence[int]) -> list[Defect]:
    """A notice where the rows of a batch differ much in length."""
    rows = args.per_device_train_batch_size
    if args.packing or args.padding_free or rows == 1 or args.train_sampling_strategy != "random":
        return []
    cut = [min(length, args.max_length or length) for length in lengths]
    if (share := padding_share(cut, rows)) < _MUCH_PADDING:
        return []
    return [
        Defect(
            "padding",
            f"{share:.0%} of the tokens in batches of {rows} rows are padding",
            "train_sampling_strategy: group_by_length puts rows of like length together",
        )
    ]


def packing_mask(args: SFTConfig, attention: str) -> list[Defect]:
    """A notice where the rows of a packed batch become one long row whose attention is computed whole, mask and all."""
    rows = args.per_device_train_batch_size
    tokens = rows * (args.max_length or 0)
    one_row = args.packing and args.packing_strategy != "wrapped" and attention in ("sdpa", "eager")
    if not one_row or rows == 1 or tokens < _LONG_ROW:
        return []
    return [
        Defect(
            "packing-mask",
            f"packing lays the {rows} rows of a batch into one of {tokens} tokens, and attention {attention} computes all "
            f"{tokens} x {tokens} pairs under a mask of {2 * tokens**2 / GIB:.2f} GiB",
            f"set per_device_train_batch_size: 1 and gradient_accumulation_steps: {rows * args.gradient_accumulation_steps}, "
            "or attn_implementation: flash_attention_2",
        )
    ]
