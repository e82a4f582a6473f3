"""The formats that a row may have, one entry of `FORMATS` each: its columns, and how it becomes token ids and a mask.

To add a format, write a function that turns a row into examples and add an entry where it should take precedence.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qriemann.data.chat_mask import AssistantTokenizer, Example, Message, RowError

Row = dict[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class RowEncoder:
    """Token ids and mask of conversations and texts, under one run's tokenizer and settings.

    Attributes:
        text_field: the column of plain texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str, text_field: str) -> None:
        self.text_field = text_field
        self.has_template = bool(tokenizer.chat_template)
        self._tokens, self._loss_on = AssistantTokenizer(tokenizer), loss_on

    def conversation(self, row: Row, messages: list[Message], *, first_trained: int = 0) -> list[Example]:
        """One example, or one for each answer where the chat template rewrites earlier turns."""
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
        options = {"tools": tools or None, "template_kwargs": row.get("chat_template_kwargs")}
        if self._loss_on == "all":
            return [self._tokens.whole_conversation(messages, **options)]
        return self._tokens.conversations(messages, first_trained=first_trained, **options)

    def completion(self, prompt: str, completion: str) -> list[Example]:
        """A prompt and its completion as plain strings."""
        if not completion.strip():
            raise RowError("an empty completion", "fill it or remove the row")
        ids, mask, straddles = self._tokens.completion(prompt, completion)
        return [(ids, [True] * len(ids), False) if self._loss_on == "all" else (ids, mask, straddles)]

    def text(self, text: str) -> list[Example]:
        """A text without roles."""
        return [self._tokens.text(text)]


@dataclass(frozen=True)
class RowFormat:
    """One format.

    Attributes:
        name: in `run.json`.
        columns: which a dataset must have; an empty name is the run's `text_field`.
        words: the columns, for the message that lists what is accepted.
        convert: makes the examples of a row; None where the rows hold tokens.
        turns: the column that holds lists of turns, which need a chat template.
    """

    name: str
    columns: tuple[str, ...]
    words: str
    convert: Callable[[RowEncoder, Row], list[Example]] | None
    turns: str | None = None


def _from_messages(encoder: RowEncoder, row: Row) -> list[Example]:
    return encoder.conversation(row, _messages(row["messages"]))


def _from_conversations(encoder: RowEncoder, row: Row) -> list[Example]:
    return encoder.conversation(row, _messages(row["conversations"]))


def _from_prompt_and_completion(encoder: RowEncoder, row: Row) -> list[Example]:
    if not isinstance(row["prompt"], list):
        return encoder.completion(_string(row, "prompt"), _string(row, "completion"))
    prompt = _messages(row["prompt"])
    return encoder.conversation(row, prompt + _messages(row["completion"]), first_trained=len(prompt))


def _from_alpaca(encoder: RowEncoder, row: Row) -> list[Example]:
    question, context, answer = (_string(row, key) for key in ("instruction", "input", "output"))
    if not answer.strip():
        raise RowError("an empty output", "fill it or remove the row")
    question = f"{question.strip()}\n\n{context.strip()}" if context.strip() else question.strip()
    if not encoder.has_template:
        return encoder.completion(question + "\n\n", answer)
    return encoder.conversation(row, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _from_text(encoder: RowEncoder, row: Row) -> list[Example]:
    text = _string(row, encoder.text_field)
    if not text.strip():
        raise RowError("no text", "fill it or remove the row")
    return encoder.text(text)


#: In order of precedence. Alpaca comes before text: its copies on the Hub also hold the rendered prompt in a text column.
FORMATS = (
    RowFormat("input_ids", ("input_ids", "labels"), "input_ids and labels", None),
    RowFormat("messages", ("messages",), "messages (role, content)", _from_messages, "messages"),
    RowFormat(
        "prompt-completion", ("prompt", "completion"), "prompt and completion", _from_prompt_and_completion, "prompt"
    ),
    RowFormat("conversations", ("conversations",), "conversations (from, value)", _from_conversations, "conversations"),
    RowFormat("alpaca", ("instruction", "output"), "instruction and output (Alpaca)", _from_alpaca),
    RowFormat("text", ("",), "text", _from_text),
)


def find_format(columns: list[str], text_field: str) -> RowFormat | None:
    """The format of rows with these columns, if there is one."""
    return next((entry for entry in FORMATS if {c or text_field for c in entry.columns} <= set(columns)), None)


def _string(row: Row, key: str) -> str:
    value = row.get(key)
    # A CSV column of numbers is read as numbers.
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str | None):
        raise RowError(f"a {type(value).__name__} instead of a string in {key}", "write a string")
    return value or ""


def _messages(turns: Any) -> list[Message]:
    """Role and content of every turn under either TRL's or ShareGPT's keys, without the keys that hold None."""
    if not isinstance(turns, list) or not turns:
        raise RowError("no list of turns, or an empty one", "fill it or remove the row")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowError(f"a {type(turn).__name__} as turn {number}, without role and content", "rewrite that turn")
        message = {key: value for key, value in turn.items() if value is not None and key not in ("from", "value")}
        written = turn.get("role") or turn.get("from")
        role = _ROLES.get(str(written).lower())
        if role is None:
            raise RowError(
                f"the unknown role {written!r} in turn {number}", f"rename it to one of {', '.join(sorted(_ROLES))}"
            )
        content = _content(turn)
        if role == "assistant" and not content.strip() and not turn.get("tool_calls"):
            raise RowError("an empty assistant turn", "fill it or remove the row")
        messages.append({**message, "role": role, "content": content})
    return messages


def _content(turn: Row) -> str:
    """The text of a turn; the text parts of a list of parts, joined."""
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        other = {part.get("type", "text") for part in parts} - {"text"}
        if other:
            raise RowError(f"a turn that is not text alone (a part is {', '.join(sorted(other))})", "remove the row")
        return "".join(part.get("text") or "" for part in parts)
    return _string({"content": content}, "content")
