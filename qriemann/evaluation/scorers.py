"""When an answer counts as right: the rules that `eval --scorer` knows by name."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from qriemann.errors import InputError, MissingExtraError

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
# Words that introduce the option in a sentence; an answer without them begins with the option.
_LEAD = re.compile(r"\banswer(?:\s+is\b|\s*:)\s*:?", re.IGNORECASE)


# How right what was said is: 1, 0, or a share.
Score = Callable[[str], float]


@dataclass(frozen=True)
class Scorer:
    """One rule.

    Attributes:
        prepare: takes a right answer and its row, and returns what scores the answers given to that row; raises InputError
            for a row that the rule cannot judge.
        reads_on: whether what is right may come after more words than the right answer has.
    """

    prepare: Callable[[str, Mapping[str, Any]], Score]
    reads_on: bool = False


def find_scorer(name: str) -> Scorer:
    """The rule of that name."""
    if name not in SCORERS:
        raise InputError(f"scorer must be one of {', '.join(SCORERS)}, got {name!r}")
    return SCORERS[name]


def last_number(text: str) -> Decimal | None:
    """The number after the last `####`, or else the last one; thousands may be set off by commas."""
    numbers = _NUMBER.findall(text.rpartition("####")[2])
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def choice(text: str) -> str | None:
    """The first word in small letters, without its brackets; where the text says "answer is" or "answer:", what follows."""
    lead = _LEAD.search(text)
    word = re.search(r"\w+", text[lead.end() :] if lead else text)
    return word[0].casefold() if word else None


def _exact(right: str, _: Mapping[str, Any]) -> Score:
    return lambda said: float(said == right)


def _contains(right: str, _: Mapping[str, Any]) -> Score:
    # As whole words: 1 is not in 12.
    wanted = re.compile(rf"(?<!\w){re.escape(right.casefold())}(?!\w)")
    return lambda said: float(wanted.search(said.casefold()) is not None)


def _read_by(read: Callable[[str], Any], what: str) -> Callable[[str, Mapping[str, Any]], Score]:
    def prepare(right: str, _: Mapping[str, Any]) -> Score:
        wanted = read(right)
        if wanted is None:
            raise InputError(f"an answer must hold {what} for this scorer, got {right!r}; choose another --scorer")
        return lambda said: float(read(said) == wanted)

    return prepare


def _reasoning_gym(right: str, row: Mapping[str, Any]) -> Score:
    """By the dataset that made the row, which the row's `metadata`, a mapping or its JSON, names under `source_dataset`."""
    metadata = row.get("metadata")
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    name = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if name is None:
        raise InputError(
            "the scorer reasoning-gym needs the rows' metadata with source_dataset; write it, or choose another --scorer"
        )
    try:
        from reasoning_gym import get_score_answer_fn
    except ModuleNotFoundError as error:
        raise MissingExtraError("the scorer reasoning-gym needs its package; pip install reasoning-gym") from error
    try:
        score = get_score_answer_fn(name)
    except ValueError as error:
        raise InputError(f"reasoning-gym has no dataset {name!r} (source_dataset of a row)") from error
    return lambda said: float(score(said, {**row, "answer": right, "metadata": metadata}))


SCORERS = {
    "exact": Scorer(_exact),
    "last-number": Scorer(_read_by(last_number, "a number"), reads_on=True),
    "choice": Scorer(_read_by(choice, "a word")),
    "contains": Scorer(_contains, reads_on=True),
    "reasoning-gym": Scorer(_reasoning_gym, reads_on=True),
}
