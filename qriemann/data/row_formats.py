"""The formats that a row may have, one entry of `FORMATS` each: its columns, and how it becomes token ids and a mask.

To add a format, write a function that turns a row into examples and add an entry where it should take precedence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from qriemann.data.chat_mask import AssistantTokenizer, Example, Message, RowError
from qriemann.data.turns import (
    ANSWERS,
    Conversation,
    Row,
    history_turns,
    read_conversation,
    system_prompt,
    turns_in_text,
)


class RowEncoder:
    """Token ids and mask of conversations and texts, under one run's tokenizer and settings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str, text_field: str) -> None:
        self.text_field = text_field
        self.has_template = bool(tokenizer.chat_template)
        self._tokenizer, self._loss_on = AssistantTokenizer(tokenizer), loss_on
        self.writes_date = self._tokenizer.writes_date

    def conversation(self, row: Row, parts: Sequence[tuple[str, Any]], *, last: Sequence[str] = ()) -> list[Example]:
        """One example, or one for each answer where the chat template rewrites earlier turns.

        Args:
            parts: column and turns; the answers of the last one are trained.
            last: the columns of the last turns, where each is a plain column (Alpaca) rather than one of a list of turns.
        """
        if not self.has_template:
            raise RowError(
                "a conversation, but the tokenizer has no chat template",
                "name a template, or a model that has one, with chat_template_path",
            )
        talk = row.talk = read_conversation(row, self._tokenizer, parts)
        talk.sources[len(talk.sources) - len(last) :] = last
        if self._loss_on == "all":
            examples = [self._tokenizer.conversation(talk.messages, talk.options, talk.marked, whole=True)]
        else:
            examples = self._tokenizer.conversations(talk.messages, talk.options, talk.context)
        unwritten = self._tokenizer.unwritten(talk.messages, talk.options, split=len(examples) > 1)
        row.dropped |= {talk.labels.get(name, name) for name in unwritten}
        for turn in talk.messages:
            if turn["role"] == "assistant" and not turn["content"].strip() and not (ANSWERS & {*turn}) - unwritten:
                lost = ", ".join(sorted(ANSWERS & {*turn}))
                raise RowError(
                    f"an empty assistant turn, because the chat template does not write its {lost}",
                    "name a template that does with chat_template_path, or remove the row",
                )
        return examples

    def completion(self, row: Row, turns: Sequence[tuple[str, Message]], prompt: str) -> list[Example]:
        """A prompt and its completion as plain strings."""
        completion, place = str(turns[-1][1]["content"]), len(turns) - 1
        if not completion.strip():
            raise RowError("an empty completion", "fill it or remove the row")
        ids, mask = self._tokenizer.completion(prompt, completion)
        start = len(ids) - sum(mask)
        spans = {place - 1: range(start), place: range(start, len(ids))}
        row.talk = Conversation([turn for _, turn in turns], [column for column, _ in turns], spans=spans)
        return [(ids, [True] * len(ids) if self._loss_on == "all" else mask)]

    def text(self, row: Row, text: str) -> list[Example]:
        """A text without roles."""
        example = self._tokenizer.text(text)
        row.talk = Conversation([_turn("assistant", text)], [self.text_field], spans={0: range(len(example[0]))})
        return [example]

    def answers(self, row: Row, ids: list[int]) -> dict[int, range]:
        """The tokens of each answer of `row.talk` in one of the row's examples."""
        return row.talk.spans or self._tokenizer.answers(row.talk.messages, ids, row.talk.options)


@dataclass(frozen=True)
class RowFormat:
    """One format.

    Attributes:
        columns: which a dataset must have; an empty name is the run's `text_field`.
        convert: makes the examples of a row; None where the rows hold tokens.
        has_answers: whether a row has a side that asks and a side that answers.
    """

    name: str
    columns: tuple[str, ...]
    words: str
    convert: Callable[[RowEncoder, Row], list[Example]] | None
    has_answers: bool = True


def _from_turns(column: str, encoder: RowEncoder, row: Row) -> list[Example]:
    return encoder.conversation(row, [(column, row.get(column))])


def _from_prompt_and_completion(encoder: RowEncoder, row: Row) -> list[Example]:
    prompt, completion = (turns_in_text(row.get(key)) for key in ("prompt", "completion"))
    if not isinstance(prompt, list):
        turns = [
            ("prompt", _turn("user", row.string("prompt"))),
            ("completion", _turn("assistant", row.string("completion"))),
        ]
        return encoder.completion(row, turns, row.string("prompt"))
    if isinstance(completion, str):
        completion = [_turn("assistant", completion)]
    return encoder.conversation(row, [("prompt", prompt), ("completion", completion)])


def _from_alpaca(encoder: RowEncoder, row: Row) -> list[Example]:
    question, context, answer = (row.string(key).strip() for key in ("instruction", "input", "output"))
    if not answer:
        raise RowError("an empty output", "fill it or remove the row")
    answer = row.string("output")
    question = f"{question}\n\n{context}" if context else question
    asked, history = [_turn("user", question), _turn("assistant", answer)], history_turns(row)
    if encoder.has_template:
        return encoder.conversation(row, [("history", [*history, *asked])], last=("instruction", "output"))
    before = [("system", _turn("system", system_prompt(row))), *(("history", turn) for turn in history)]
    turns = [*before, *zip(("instruction", "output"), asked, strict=True)]
    texts = [str(turn.get("content") or "") for _, turn in turns[:-1]]
    return encoder.completion(row, turns, "".join(f"{text}\n\n" for text in texts if text))


def _from_text(encoder: RowEncoder, row: Row) -> list[Example]:
    text = row.string(encoder.text_field)
    if not text.strip():
        raise RowError("no text", "fill it or remove the row")
    return encoder.text(row, text)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


#: In order of precedence. Alpaca comes before text: its copies on the Hub also hold the rendered prompt in a text column.
FORMATS = (
    RowFormat("input_ids", ("input_ids", "labels"), "input_ids and labels", None, has_answers=False),
    RowFormat("messages", ("messages",), "messages (role, content)", partial(_from_turns, "messages")),
    RowFormat("prompt-completion", ("prompt", "completion"), "prompt and completion", _from_prompt_and_completion),
    RowFormat(
        "conversations",
        ("conversations",),
        "conversations (from, value)",
        partial(_from_turns, "conversations"),
    ),
    RowFormat("alpaca", ("instruction", "output"), "instruction and output (Alpaca)", _from_alpaca),
    RowFormat("text", ("",), "text", _from_text, has_answers=False),
)


def find_format(columns: list[str], text_field: str) -> RowFormat | None:
    """The format of rows with these columns, if there is one."""
    return next((entry for entry in FORMATS if {c or text_field for c in entry.columns} <= set(columns)), None)


def is_row(content: dict[str, Any]) -> bool:
    """Whether an object is a row of some format, or of those that an evaluation takes beside them."""
    return any(find_format([*content], text_field) for text_field in ("text", "prompt"))


def text_to_score(columns: list[str]) -> str:
    """The column of texts for an evaluation, which takes prompts without anything after them too."""
    return "text" if "completion" in columns else "prompt"


def answers_beside(columns: list[str]) -> bool:
    """Whether an evaluation finds the right answers in a column of their own, beside prompts or conversations."""
    return "answer" in columns and "completion" not in columns and not {"prompt", "messages"}.isdisjoint(columns)


def answer_as_completion(row: Row) -> dict[str, Any]:
    """`prompt` and `completion`, both conversations or both plain texts; the answer takes the place of a last answer."""
    rest = {key: value for key, value in row.items() if key not in ("prompt", "messages")}
    answer, prompt = answer_of(row), row.get("messages") or row.get("prompt") or ""
    if isinstance(prompt, str):
        return {**rest, "prompt": prompt, "completion": answer}
    turns = prompt[:-1] if prompt[-1].get("role") == "assistant" else prompt
    return {**rest, "prompt": turns, "completion": [_turn("assistant", answer)]}


def answer_of(row: Row) -> str:
    """The right answer for an evaluation; empty if the row has none."""
    answer = row.get("answer")
    return "" if answer is None else str(answer)
