"""A page about the training data: counts over all rows, and a sample of rows as the model reads them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qriemann.chat.session import prompt_tokens
from qriemann.data.account import FINDINGS, Account, choose_rows
from qriemann.data.chat_mask import IGNORED, common_prefix_length
from qriemann.data.row_formats import RowEncoder, find_format
from qriemann.data.sources import Source
from qriemann.data.tokenized import TokenizedData
from qriemann.data.turns import Conversation, Row
from qriemann.errors import InputError
from qriemann.folder.files import replace_text
from qriemann.release.templates import render_document

SAMPLE_ROWS = 20
# Of one row; longer stretches lose their middle.
_SHOWN_TOKENS, _SHOWN_PIECES = 600, 40
# The time to compare two prompts grows with the product of what differs in them.
_COMPARED_TOKENS = 1000

Piece = dict[str, Any]


def describe_rows(
    source: Source,
    data: TokenizedData,
    account: Account,
    encoder: RowEncoder,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> dict[str, Any]:
    """Counts over all rows, and at most `SAMPLE_ROWS` of the training rows in coloured pieces, as JSON takes it."""
    held_out = [] if account.held_out is None else [account.held_out]
    groups = {"all": [account.train, *account.left_out, *held_out], "training": [account.train]}
    groups |= {"held out": held_out} if held_out else {}
    counts = [[sum(part.count(name) for part in group) for group in groups.values()] for name in FINDINGS]
    sampler = _Sampler(encoder, tokenizer, max_length)
    sample = []
    for number, findings, tokens in _choose(data, account):
        (row,) = source.read(source.rows[[number]])
        described = sampler.describe(row, source, tokens)
        unused = [name for name in row.unused if name in data.unused]
        findings += [f"not trained: {', '.join(unused)}"] if unused else []
        sample.append({"row": number + 1, "findings": findings, **described})
    return {
        "name": source.name,
        "rows": {name: sum(map(len, group)) for name, group in groups.items()},
        "findings": list(zip(FINDINGS.values(), counts, strict=True)),
        "unused": data.unused,
        "sample": sample,
    }


def write_page(path: Path, rows: dict[str, Any], said: Sequence[str]) -> None:
    """Replaces the file by an HTML page with what `describe_rows` found, below the notices and defects in `said`."""
    replace_text(path, render_document("check.html.jinja", name=rows["name"], rows=rows, said=said))


def preview(rows: dict[str, Any]) -> list[tuple[str, Text]]:
    """Two rows of the sample for a terminal, each with a title; trained tokens are bold, green and in brackets."""
    found = []
    for row in rows["sample"][:2]:
        text = Text()
        for piece in row["pieces"]:
            gap = f" [... {piece['gap']} tokens ...] " if piece["gap"] else ""
            shown, trained = piece["text"] + gap + piece["rest"], piece["kind"] == "trained"
            text.append(f"[{shown}]" if trained else shown, style="bold green" if trained else "dim")
        found.append((f"row {row['row']}, trained tokens in brackets", text))
    return found


def _choose(data: TokenizedData, account: Account) -> list[tuple[int, list[str], dict[str, list[int]]]]:
    """(number in the source, findings, tokens and labels) of the sample, in the source's order."""
    train, chosen = account.train, []
    for dataset, rows in zip(data.left_out[:1], account.left_out, strict=False):
        for name in (name for name in ("masked", "beyond") if rows.count(name)):
            index = int(rows.found[name].argmax())
            chosen.append((dataset[index]["row"], [f"left out: {FINDINGS[name]}"], dataset[index]))
    for index in choose_rows(train, SAMPLE_ROWS - len(chosen)):
        findings = [FINDINGS[name] for name, holds in train.found.items() if holds[index] and name != "copy"]
        if train.found["copy"][index]:
            findings.append(f"a copy of row {data.numbers[train.first[index]] + 1}")
        chosen.append((data.numbers[index], findings, data.train[index]))
    return sorted(chosen, key=lambda entry: entry[0])


@dataclass(frozen=True)
class _Sampler:
    """Splits rows into pieces under the settings that they were tokenized with."""

    encoder: RowEncoder
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None

    def describe(self, row: Row, source: Source, tokens: dict[str, list[int]]) -> dict[str, Any]:
        """The row as the model reads it, and as chat sends its last trained answer's prompt."""
        ids, labels = tokens["input_ids"], tokens["labels"]
        row_format = find_format(source.columns, self.encoder.text_field)
        assert row_format is not None
        spans: dict[int, range] = {}
        other = "labels"
        if row_format.convert is not None:
            row_format.convert(self.encoder, row)
            spans, other = self.encoder.answers(row, ids), "chat template"
        origins = {place: row.talk.sources[turn] for turn, places in spans.items() for place in places}

        def kind(place: int) -> tuple[str, str]:
            if self.max_length is not None and place >= self.max_length:
                return "cut", ""
            # A first token is never predicted: nothing comes before it.
            trained = place > 0 and labels[place] != IGNORED
            return ("trained", origins.get(place, other)) if trained else ("context", "")

        runs = [(key, list(places)) for key, places in groupby(range(len(ids)), kind)]
        return {
            "tokens": len(ids),
            "trained": sum(len(places) for (name, _), places in runs if name == "trained"),
            "pieces": self._pieces([(*key, ids, places[0], places[-1] + 1) for key, places in runs]),
            "chat": self._chat(row.talk, spans, ids, labels[: self.max_length]),
        }

    def _chat(self, talk: Conversation, spans: dict[int, range], ids: list[int], labels: list[int]) -> Any:
        answered = (
            turn
            for turn, places in spans.items()
            if turn and any(labels[i] != IGNORED for i in places if i < len(labels))
        )
        if (last := max(answered, default=None)) is None:
            return None
        read = ids[: spans[last].start]
        try:
            sent = prompt_tokens(self.tokenizer, chat_messages(talk, last))
        except InputError as error:
            return {"refused": str(error)}
        runs = list(_differences(read, sent))
        differing = sum(stop - start for kind, _, _, start, stop in runs if kind != "same")
        return {"differing": differing, "tokens": len(sent), "pieces": self._pieces(runs)}

    def _pieces(self, runs: Sequence[tuple[str, str, list[int], int, int]]) -> list[Piece]:
        """Runs (kind, source, tokens, start, stop) as text; those in the middle of very many are left out."""
        half = _SHOWN_PIECES // 2
        shown = [*runs[:half], *runs[-half:]] if len(runs) > _SHOWN_PIECES else runs
        limit = max(_SHOWN_TOKENS // max(len(shown), 1), 20)
        pieces = [self._piece(*run, limit=limit) for run in shown]
        if shown is not runs:
            lost = sum(stop - start for *_, start, stop in runs[half:-half])
            pieces.insert(half, {"kind": "context", "source": "", "tokens": lost, "text": "", "gap": lost, "rest": ""})
        return pieces

    def _piece(self, kind: str, source: str, ids: list[int], start: int, stop: int, limit: int) -> Piece:
        gap = max(stop - start - limit, 0)
        middle = start + limit // 2 if gap else stop
        rest = self._text(ids, middle + gap, stop) if gap else ""
        text = self._text(ids, start, middle)
        return {"kind": kind, "source": source, "tokens": stop - start, "text": text, "gap": gap, "rest": rest}

    def _text(self, ids: list[int], start: int, stop: int) -> str:
        # Some tokenizers drop the space before the first token that they decode.
        before = self.tokenizer.decode(ids[max(start - 1, 0) : start], clean_up_tokenization_spaces=False)
        text = self.tokenizer.decode(ids[max(start - 1, 0) : stop], clean_up_tokenization_spaces=False)
        if text.startswith(before):
            return text[len(before) :]
        return self.tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)


def chat_messages(talk: Conversation, turn: int) -> list[dict[str, str]]:
    """The turns before an answer, as far as `qriemann chat` can have them: a system prompt, questions and answers."""
    messages = []
    for index, message in enumerate(talk.messages[:turn]):
        role, content = message.get("role"), str(message.get("content") or "")
        role = "system" if role == "developer" and index == 0 else role
        content = content.strip() if role == "assistant" else content
        if content and (role in ("user", "assistant") or (role == "system" and index == 0)):
            messages.append({"role": role, "content": content})
    return messages


def _differences(read: list[int], sent: list[int]) -> Iterator[tuple[str, str, list[int], int, int]]:
    """Runs (kind, source, tokens, start, stop) that both prompts have, and those that one of them has."""
    start = common_prefix_length(read, sent)
    end = common_prefix_length(read[start:][::-1], sent[start:][::-1])
    left, right = read[start : len(read) - end], sent[start : len(sent) - end]
    if max(len(left), len(right)) > _COMPARED_TOKENS:
        steps: list[tuple[str, int, int, int, int]] = [("replace", 0, len(left), 0, len(right))]
    else:
        steps = [*SequenceMatcher(None, left, right, autojunk=False).get_opcodes()]
    last = ("equal", len(left), len(left) + end, len(right), len(right) + end)
    for name, a, b, c, d in [("equal", -start, 0, -start, 0), *steps, last]:
        runs = [("same", read, a, b)] if name == "equal" else [("read", read, a, b), ("sent", sent, c, d)]
        for kind, ids, first, stop in runs:
            if stop > first:
                yield kind, "", ids, start + first, start + stop
