"""Token statistics of all rows: which are masked, cut, without a trained end, duplicated, or in both splits."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qriemann.base.chat_template import end_tokens
from qriemann.data.chat_mask import IGNORED

if TYPE_CHECKING:
    from qriemann.data.tokenized import TokenizedData

#: Findings about a row, and the words for them.
FINDINGS = {
    "masked": "every token is masked",
    "beyond": "every token before max_length is masked",
    "cut": "cut at max_length",
    "endless": "without a trained end",
    "copy": "a copy of an earlier row",
    "elsewhere": "in the training and the held-out rows",
    "doubled-bos": "with two tokens for the beginning",
    "outside": "with tokens outside the embedding",
}


@dataclass(frozen=True)
class RowAccount:
    """The rows of one dataset; every array has one entry per row.

    Attributes:
        trained: tokens that a loss counts.
        prints: hashes of the tokens.
        first: index of the first row with the same tokens.
        found: for each name in `FINDINGS`, which rows it holds for.
    """

    lengths: np.ndarray
    trained: np.ndarray
    largest: np.ndarray
    prints: np.ndarray
    first: np.ndarray
    found: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.lengths)

    def count(self, name: str) -> int:
        """The number of rows that a finding holds for."""
        return int(self.found[name].sum()) if name in self.found else 0


@dataclass(frozen=True)
class Account:
    """The account of all rows of a run."""

    train: RowAccount
    held_out: RowAccount | None
    left_out: list[RowAccount]
    ends: list[int]
    embedding_rows: int


def take_account(
    data: TokenizedData, tokenizer: PreTrainedTokenizerBase, model: Any, max_length: int | None = None
) -> Account:
    """The account of the rows as they will be trained."""
    ends, size = end_tokens(tokenizer, model), model.get_input_embeddings().weight.shape[0]

    def count(dataset: Dataset) -> RowAccount:
        return count_rows(dataset, max_length, ends, tokenizer.bos_token_id, size)

    train, held_out = count(data.train), None if data.held_out is None else count(data.held_out)
    if held_out is not None:
        train.found["elsewhere"] = np.isin(train.prints, held_out.prints)
        held_out.found["elsewhere"] = np.isin(held_out.prints, train.prints)
    return Account(train, held_out, [*map(count, data.left_out)], ends, size)


def count_rows(
    dataset: Dataset,
    max_length: int | None,
    ends: Collection[int] = (),
    bos: int | None = None,
    embedding_rows: int | None = None,
) -> RowAccount:
    """The account of one dataset's `input_ids` and `labels`; what needs an argument that is missing holds of no row."""
    tables = dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000)
    parts = [_read(table, [*ends], bos, embedding_rows or np.inf, max_length or np.inf) for table in tables]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    none = np.zeros(0, np.int64)
    lengths, trained, largest, prints = (arrays.pop(name, none) for name in ("lengths", "trained", "largest", "prints"))
    _, places, inverse = np.unique(prints, return_index=True, return_inverse=True)
    first = places[inverse]
    return RowAccount(lengths, trained, largest, prints, first, {**arrays, "copy": first < np.arange(len(first))})


def choose_rows(rows: RowAccount, limit: int) -> list[int]:
    """The rows to look at: one for each finding, the longest and the shortest, and others evenly spread."""
    if len(rows) <= limit:
        return list(range(len(rows)))
    chosen = {int(holds.argmax()) for holds in rows.found.values() if holds.any()}
    chosen |= {int(rows.lengths.argmax()), int(rows.lengths.argmin())}
    chosen.update(np.linspace(0, len(rows) - 1, limit - len(chosen)).astype(int).tolist())
    return sorted(chosen)


def _read(
    table: pa.Table, ends: list[int], bos: int | None, embedding_rows: float, max_length: float
) -> dict[str, np.ndarray]:
    columns = [table.combine_chunks().column(name).chunk(0) for name in ("input_ids", "labels")]
    lengths = columns[0].value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    ids, labels = (column.flatten().to_numpy(zero_copy_only=False).astype(np.int64) for column in columns)
    starts, rows = np.cumsum(lengths) - lengths, np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(ids)) - starts[rows]

    def count_of(tokens: np.ndarray) -> np.ndarray:
        return np.bincount(rows[tokens], minlength=len(lengths))

    # A first token is never predicted: nothing comes before it.
    trained = (labels != IGNORED) & (places > 0)
    kept, begins = trained & (places < max_length), ids == (-1 if bos is None else bos)
    largest = np.full(len(lengths), -1)
    np.maximum.at(largest, rows, ids)
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in np.split(ids, starts[1:])]
    return {
        "lengths": lengths,
        "trained": count_of(trained),
        "largest": largest,
        "prints": np.frombuffer(b"".join(digests), np.int64),
        "masked": count_of(trained) == 0,
        "beyond": (count_of(trained) > 0) & (count_of(kept) == 0),
        "cut": lengths > max_length,
        "endless": (count_of(kept & np.isin(labels, ends)) == 0) & bool(ends),
        "doubled-bos": count_of((places == 1) & begins & np.roll(begins, 1)) > 0,
        "outside": largest >= embedding_rows,
    }
