"""Mistakes in the training data, found in its tokens.

An error stops the run, because the loss curve would not show it: a model whose end token is never trained does not stop
talking, and packed samples that see each other teach it to attend to unrelated text. A user who means it names it in `allow`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qriemann.base.chat_template import end_of_turn
from qriemann.data.tokenized import IGNORED, TokenizedData
from qriemann.errors import InputError

# Below this share of rows, an end token that is rarely trained is worth a line.
_MOST_ROWS = 0.5
# A preview leaves out the middle of longer runs of tokens.
_SHOWN_TOKENS = 400


@dataclass(frozen=True)
class Defect:
    """One mistake.

    Attributes:
        name: for `allow`.
        problem: what is wrong.
        remedy: what to do.
        error: whether it stops the run.
    """

    name: str
    problem: str
    remedy: str
    error: bool = False

    def __str__(self) -> str:
        allowed = f", or --allow {self.name} if it is meant" if self.error else ""
        return f"{self.problem}; {self.remedy}{allowed}"


def refuse(defects: Iterable[Defect], allow: Collection[str], note: Callable[[str], None]) -> None:
    """Notes every defect, and stops at the first error that is not allowed.

    Raises:
        InputError: that error.
    """
    stopping = None
    for defect in defects:
        if defect.error and defect.name not in allow:
            stopping = stopping or defect
        else:
            note(f"{'allowed: ' if defect.error else ''}{defect}")
    if stopping is not None:
        raise InputError(str(stopping))


def find_defects(
    data: TokenizedData, tokenizer: PreTrainedTokenizerBase, model: Any, max_length: int | None = None
) -> list[Defect]:
    """The defects of the rows as they will be trained, errors first.

    Args:
        data: before truncation and packing.
        tokenizer: with which the data was made.
        model: whose embedding must have a row for every token.
        max_length: the tokens that are kept of a row.

    Cost: one pass over the tokens.
    """
    ends, rows = end_tokens(tokenizer, model), model.get_input_embeddings().weight.shape[0]
    ended = doubled = largest = 0
    for ids, labels in _rows(data.train):
        ended += bool(np.isin(labels[1:max_length], ends).any())
        doubled += len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
        largest = max(largest, int(ids.max()))
    count, names = len(data.train), " or ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in ends)
    found = []
    if ends and not ended:
        found.append(
            Defect(
                "end-token-untrained",
                f"none of {count} rows trains the end of a turn ({names}), so the model would never learn to stop",
                "use a chat template that ends the assistant's turn with it, or raise max_length if rows are cut",
                error=True,
            )
        )
    elif ends and ended < _MOST_ROWS * count:
        found.append(
            Defect(
                "end-token-rare",
                f"the end of a turn ({names}) is trained in only {ended} of {count} rows",
                "raise max_length if rows are cut, or end them with it",
            )
        )
    if largest >= rows:
        found.append(
            Defect(
                "token-outside-embedding",
                f"token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is outside the embedding's {rows} rows",
                "use the tokenizer that belongs to the model, or resize its embedding",
                error=True,
            )
        )
    if doubled:
        found.append(
            Defect(
                "doubled-bos",
                f"{tokenizer.bos_token!r} is doubled at the start of {doubled} of {count} rows",
                "remove it from the texts, or from the chat template",
            )
        )
    if tokenizer.pad_token_id in ends:
        found.append(
            Defect(
                "pad-is-end",
                f"{tokenizer.pad_token!r} is both the pad token and an end token, which other tools then mask",
                "set pad_token to another token; the labels of this run are not affected",
            )
        )
    if data.held_out is not None:
        trained = {ids.tobytes() for ids, _ in _rows(data.train)}
        common = sum(ids.tobytes() in trained for ids, _ in _rows(data.held_out))
        if common:
            found.append(
                Defect(
                    "rows-in-both-splits",
                    f"{common} of {len(data.held_out)} held-out rows are also training rows, so the held-out loss is "
                    "meaningless",
                    "remove the duplicates",
                )
            )
    return sorted(found, key=lambda defect: not defect.error)


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> list[int]:
    """The tokens that end a turn or a text: the tokenizer's, the generation config's and the chat template's."""
    generation = getattr(model, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return sorted(end for end in ends | {end_of_turn(tokenizer)} if end is not None)


def preview(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """The first two rows, decoded, with the trained tokens in colour, bold and brackets.

    Args:
        dataset: `input_ids` and `labels`.
        tokenizer: with which they were made.
    """
    rows = dataset.select(range(min(2, len(dataset))))
    return [_coloured(row["input_ids"], row["labels"], tokenizer) for row in rows]


def _coloured(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Text:
    # A first token is never predicted: nothing comes before it.
    trained = [index > 0 and label != IGNORED for index, label in enumerate(labels)]
    text, start = Text(), 0
    for stop in range(1, len(ids) + 1):
        if stop < len(ids) and trained[stop] == trained[start]:
            continue
        run = ids[start:stop]
        shown = tokenizer.decode(run)
        if len(run) > _SHOWN_TOKENS:
            left_out = f" [... {len(run) - _SHOWN_TOKENS} tokens ...] "
            half = _SHOWN_TOKENS // 2
            shown = tokenizer.decode(run[:half]) + left_out + tokenizer.decode(run[-half:])
        text.append(f"[{shown}]" if trained[start] else shown, style="bold green" if trained[start] else "dim")
        start = stop
    return text


def _rows(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("numpy").iter(batch_size=1000):
        yield from zip(batch["input_ids"], batch["labels"], strict=True)
