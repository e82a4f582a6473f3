"""Mistakes in the training data, found in the account of its tokens.

An error stops the run, because the loss curve would not show it: a model whose end token is never trained does not stop
talking, and packed samples that see each other teach it to attend to unrelated text. A user who means it names it in `allow`.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qriemann.data.account import Account
from qriemann.errors import InputError

# Below this share of rows, an end token that is rarely trained is worth a line.
_MOST_ROWS = 0.5


@dataclass(frozen=True)
class Defect:
    """One mistake."""

    name: str
    problem: str
    remedy: str
    error: bool = False

    def __str__(self) -> str:
        allowed = f", or --allow {self.name} if it is meant" if self.error else ""
        return f"{self.problem}; {self.remedy}{allowed}"


def refuse(defects: Iterable[Defect], allow: Collection[str], note: Callable[[str], None]) -> None:
    """Notes every defect, and stops at the first error that is not allowed."""
    stopping = None
    for defect in defects:
        if defect.error and defect.name not in allow:
            stopping = stopping or defect
        else:
            note(f"{'allowed: ' if defect.error else ''}{defect}")
    if stopping is not None:
        raise InputError(str(stopping))


def find_defects(account: Account, tokenizer: PreTrainedTokenizerBase) -> list[Defect]:
    """The defects of the rows as they will be trained, errors first."""
    train, held_out, ends = account.train, account.held_out, account.ends
    count, largest = len(train), int(train.largest.max())
    ended, doubled = count - train.count("endless"), train.count("doubled-bos")
    common = 0 if held_out is None else held_out.count("elsewhere")
    names = " or ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in ends)
    candidates = {
        Defect(
            "end-token-untrained",
            f"none of {count} rows trains the end of a turn ({names}), so the model would never learn to stop",
            "use a chat template that ends the assistant's turn with it, or raise max_length if rows are cut",
            error=True,
        ): bool(ends) and not ended,
        Defect(
            "token-outside-embedding",
            f"token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is outside the embedding's "
            f"{account.embedding_rows} rows",
            "use the tokenizer that belongs to the model, or resize its embedding",
            error=True,
        ): largest >= account.embedding_rows,
        Defect(
            "end-token-rare",
            f"the end of a turn ({names}) is trained in only {ended} of {count} rows",
            "raise max_length if rows are cut, or end them with it",
        ): bool(ends) and 0 < ended < _MOST_ROWS * count,
        Defect(
            "doubled-bos",
            f"{tokenizer.bos_token!r} is doubled at the start of {doubled} of {count} rows",
            "remove it from the texts, or from the chat template",
        ): doubled > 0,
        Defect(
            "pad-is-end",
            f"{tokenizer.pad_token!r} is both the pad token and an end token, which other tools then mask",
            "set pad_token to another token; the labels of this run are not affected",
        ): tokenizer.pad_token_id in ends,
        Defect(
            "rows-in-both-splits",
            f"{common} of {len(held_out or ())} held-out rows are also training rows, so the held-out loss is meaningless",
            "remove the duplicates",
        ): common > 0,
    }
    return [defect for defect, holds in candidates.items() if holds]
