"""Held-out rows to score a model on or to compare two: tokens, and which of them count."""

import dataclasses
import json
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from transformers import PreTrainedTokenizerBase

from qriemann.data.row_formats import answer_as_completion, answer_of, answers_beside, text_to_score
from qriemann.data.sources import Source, load_sources
from qriemann.data.tokenized import IGNORED, tokenize_rows
from qriemann.evaluation.reload import ScoredRow

_EXTRA = ("question", "metadata")
# What the scorers read.
_READ = ("answer", *_EXTRA)


@dataclass(frozen=True)
class Rows:
    """Tokenized rows.

    Attributes:
        source: where they come from, in words, without a path.
        answers: the `answer` of each row; empty if the rows have none.
        extra: what else each row with an answer has that a scorer may read, its `question` and `metadata`.
    """

    source: str
    rows: list[ScoredRow]
    answers: list[str]
    notices: list[str]
    extra: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return sum(len(row["positions"]) for row in self.rows)


def load_rows(
    data: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_tokens: int | None = None,
    max_rows: int | None = None,
) -> Rows:
    """The held-out rows of a dataset, or the built-in prompts.

    Args:
        data: a local file or a Hub id in any format of the recipe, and also `prompt` or `messages` with `answer`, or
            `prompt` alone; where it has a split to hold out, that one. None for the built-in prompts.
        max_length: rows are cut there, in tokens; None for no limit, as below.
        max_tokens: rows after the one that reaches so many counted tokens are left out.
    """
    source = (_built_in(tokenizer) if data is None else _held_out_source(data)).first(max_rows)
    prepared = tokenize_rows(
        source,
        None,
        tokenizer,
        text_field=text_to_score(source.columns),
        max_length=max_length,
        allow=["rejected-rows"],
        read_elsewhere=_READ,
    )
    rows: list[ScoredRow] = []
    counted = 0
    for example in prepared.train:
        ids, labels = example["input_ids"][:max_length], example["labels"][:max_length]
        positions = [index - 1 for index in range(1, len(ids)) if labels[index] != IGNORED]
        rows.append(ScoredRow(ids=ids, positions=positions, targets=[labels[index + 1] for index in positions]))
        counted += len(positions)
        if max_tokens is not None and counted >= max_tokens:
            break
    notices = list(prepared.notices)
    if len(rows) < len(prepared.train):
        notices.append(f"the first {len(rows)} of {len(prepared.train)} rows are used, {counted} tokens")
    read = [row for row in source if not row.rejected(rated=True)] if "answer" in source.columns else []
    answers = [answer_of(row).strip() for row in read]
    extra = [{name: row[name] for name in _EXTRA if name in row} for row in read]
    return Rows(source.name, rows, answers, notices, extra)


def _held_out_source(data: str) -> Source:
    train, held_out = load_sources(data)
    source = held_out or train
    # The file's name without its folder: reports are published.
    name = source.name.replace("\\", "/").rpartition("/")[2]
    if answers_beside(source.columns):
        return Source.of(map(answer_as_completion, source), name)
    return dataclasses.replace(source, name=name)


def _built_in(tokenizer: PreTrainedTokenizerBase) -> Source:
    lines = resources.files("qriemann.evaluation").joinpath("prompts.jsonl").read_text("utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    if tokenizer.chat_template:
        roles = {"prompt": "user", "completion": "assistant"}
        rows = [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in rows]
    return Source.of(rows, "the built-in prompts")
