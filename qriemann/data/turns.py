"""The turns of a row as chat templates take them, whichever tool wrote them: OpenAI's keys, ShareGPT's, Alpaca's history.

A row keeps account of itself while it is read: a column that nobody asks for is not trained, and the run says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qriemann.data.chat_mask import AssistantTokenizer, Message, RowError

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(
        ("tool", "function", "observation", "tool_response", "function_response", "tool_result", "ipython"), "tool"
    ),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
#: A turn that is not to be learnt says so with 0 or false: OpenAI and Mistral, Axolotl, ms-swift.
MARKS = ("weight", "train", "training", "trainable", "loss")
_ROW_MARKS = ("weight", "train")
# Columns that rate the answer of a row: TRL's KTO, LLaMA-Factory's.
_RATINGS = ("label", "kto_tag")
_OFF, _ON = ("0", "0.0", "false", "no"), ("1", "1.0", "true", "yes")
_SYSTEM = ("system", "system_prompt")
#: Keys that may hold all that a turn says.
ANSWERS = frozenset({"tool_calls", "reasoning_content", "reasoning", "thinking"})


class Row(dict[str, Any]):
    """The cells of a row; it remembers which of them were read."""

    def __init__(self, cells: dict[str, Any]) -> None:
        super().__init__(cells)
        self.used: set[str] = set()
        self.dropped: set[str] = set()
        self.told: set[str] = set()
        self.talk = Conversation()

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return super().get(key, default)

    @property
    def unused(self) -> list[str]:
        """Columns and turn keys that hold something and are not trained."""
        left = [key for key, value in self.items() if key not in self.used and not _is_blank(value)]
        return left + sorted(self.dropped)

    def string(self, key: str) -> str:
        """The cell as text; empty if there is none."""
        return _string(self.get(key), key)

    def rejected(self, *, rated: bool) -> str | None:
        """The cell that says that this row is not to be learnt; `rated` says whether the row has an answer to rate."""
        for key in _RATINGS if rated else ():
            value = str(super().get(key)).lower()
            if value == "false":
                return f"{key}: {value}"
            if value == "true":
                self.used.add(key)
        marks = [key for key in _ROW_MARKS if key in self and not self.learnt(self, key, key)]
        return f"{marks[0]}: {self[marks[0]]}" if marks else None

    def learnt(self, holder: dict[str, Any], key: str, label: str) -> bool:
        """What a mark says; one that is neither yes nor no, such as a weight of 0.5, counts as not used."""
        value = dict.get(holder, key)
        written = str(value).strip().lower()
        if written in _OFF or (isinstance(value, int | float) and value < 0):
            return False
        if written in _ON:
            self.used.add(label)
        elif label != key and value is not None:
            self.dropped.add(label)
        return True


@dataclass
class Conversation:
    """Turns for a chat template.

    Attributes:
        sources: for each of them the column that it came from, and which of its turns it is.
        spans: the tokens of a turn, where no chat template wrote it.
        marked: indices of the answers that the row marks as not to be learnt.
        first_trained: answers before this index belong to the prompt.
    """

    messages: list[Message] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    spans: dict[int, range] = field(default_factory=dict)
    marked: set[int] = field(default_factory=set)
    first_trained: int = 0
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def context(self) -> set[int]:
        """Indices of the answers that are not trained."""
        return self.marked | {i for i in range(self.first_trained) if self.messages[i]["role"] == "assistant"}


def read_conversation(row: Row, tokenizer: AssistantTokenizer, parts: Sequence[tuple[str, Any]]) -> Conversation:
    """The turns of a row, its system prompt first, and what else the chat template is to have.

    Args:
        parts: column and turns; the answers of the last one are trained.
    """
    talk = Conversation()
    for column, turns in parts:
        talk.first_trained = len(talk.messages) if len(parts) > 1 else 0
        turns = parse_json(turns, column)
        if not isinstance(turns, list) or not turns:
            raise RowError(f"no list of turns in {column}, or an empty one", "fill it or remove the row")
        for number, turn in enumerate(turns, 1):
            _add_turn(talk, row, tokenizer, column, turn)
            talk.sources.append(f"{column}, turn {number}")
    _add_system(talk, row)
    template_kwargs = parse_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if not isinstance(template_kwargs, dict | None):
        raise RowError("chat_template_kwargs that are no mapping", "correct them")
    talk.options = {"tools": _read_tools(row), **(template_kwargs or {})}
    return talk


def history_turns(row: Row) -> list[dict[str, Any]]:
    """Alpaca's column `history`, pairs of a question and its answer, as turns."""
    turns: list[dict[str, Any]] = []
    for pair in parse_json(row.get("history"), "history") or ():
        if isinstance(pair, dict):
            turns.append(pair)
        elif isinstance(pair, list | tuple) and len(pair) == 2:
            turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
        else:
            raise RowError("a history that is not a list of questions with their answers", "rewrite it")
    return turns


def system_prompt(row: Row) -> str:
    """The row's system prompt from its own column; empty if it has none."""
    return next((text for key in _SYSTEM if not _is_blank(dict.get(row, key)) and (text := row.string(key))), "")


def _read_tools(row: Row) -> list[Any] | None:
    """The tools that a row offers, from `tools` or from OpenAI's older `functions`."""
    tools = parse_json(row.get("tools"), "tools")
    if not tools and not _is_blank(dict.get(row, "functions")):
        functions = parse_json(row.get("functions"), "functions")
        tools = [{"type": "function", "function": function} for function in functions]
    tools = [parse_json(tool, "tools") for tool in (tools if isinstance(tools, list) else [tools])] if tools else []
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools that are no list of JSON objects", "correct them")
    return [_tool(tool) for tool in tools] or None


def parse_json(value: Any, what: str) -> Any:
    """The value of a JSON text, None of a blank one; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)[:80]
        raise RowError(f"{what} that cannot be read as JSON ({reason})", "correct it or remove the row") from error


def turns_in_text(value: Any) -> Any:
    """The turns of a cell that is a JSON text of turns, as CSV holds them; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return value
    are_turns = bool(turns) and all(isinstance(turn, dict) and {"role", "from"} & {*turn} for turn in turns)
    return turns if are_turns else value


def _add_system(talk: Conversation, row: Row) -> None:
    first = talk.messages[0]
    # A system turn in the conversation takes precedence; a column that says something else is then not used.
    if first["role"] in ("system", "developer"):
        row.used |= {key for key in _SYSTEM if dict.get(row, key) == first["content"]}
    elif text := system_prompt(row):
        talk.messages.insert(0, {"role": "system", "content": text})
        talk.sources.insert(0, next(key for key in _SYSTEM if key in row.used))
        talk.marked = {index + 1 for index in talk.marked}
        talk.first_trained += bool(talk.first_trained)


def _add_turn(talk: Conversation, row: Row, tokenizer: AssistantTokenizer, column: str, turn: Any) -> None:
    number = len(talk.messages) + 1
    if not isinstance(turn, dict):
        raise RowError(f"a {type(turn).__name__} as turn {number}, without role and content", "rewrite that turn")
    written = turn.get("role") or turn.get("from")
    role = _ROLES.get(str(written).lower())
    if role is None:
        raise RowError(
            f"the unknown role {written!r} in turn {number}", f"rename it to one of {', '.join(sorted(_ROLES))}"
        )
    message = {key: value for key, value in turn.items() if value is not None and key not in ("from", "value", *MARKS)}
    marks = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    content = _content(turn)
    if role == "call":
        role = "assistant"
        if tokenizer.writes_calls:
            message["tool_calls"], content = content, ""
        else:
            row.told.add("function calls are trained as text: the chat template writes no tool calls")
    # User turns are never trained on. A weight of 1 on every turn asks for nothing.
    row.dropped |= {f"{column}[].{key}" for key, mark in marks.items() if role != "assistant" and mark is True}
    if role == "assistant":
        learnt = [row.learnt(turn, key, f"{column}[].{key}") for key in marks]
        if not all(learnt):
            talk.marked.add(len(talk.messages))
            row.told.add("answers that are marked as not to be learnt are context only")
        _add_calls(message, tokenizer, number)
        if not content.strip() and not ANSWERS & {key for key in message if not _is_blank(message[key])}:
            raise RowError("an empty assistant turn", "fill it or remove the row")
    talk.messages.append({**message, "role": role, "content": content})
    for key in message:
        talk.labels.setdefault(key, f"{column}[].{key}")


def _add_calls(message: Message, tokenizer: AssistantTokenizer, number: int) -> None:
    """Tool calls as a list of mappings, and their arguments as the template takes them; OpenAI's older key likewise."""
    older = message.pop("function_call", None)
    if not message.get("tool_calls") and not older:
        message.pop("tool_calls", None)
        return
    what = f"a tool call in turn {number}"
    calls = parse_json(message.get("tool_calls") or older, what)
    message["tool_calls"] = [
        _call(parse_json(call, what), tokenizer, what) for call in (calls if isinstance(calls, list) else [calls])
    ]


def _call(call: Any, tokenizer: AssistantTokenizer, what: str) -> dict[str, Any]:
    if isinstance(call, dict) and "function" not in call:
        call = {"type": "function", "function": call}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        raise RowError(f"{what} without the name of a function", "correct it or remove the row")
    arguments = function.get("arguments")
    if not (tokenizer.argument_text and isinstance(arguments, str)):
        arguments = parse_json(arguments, f"arguments of {what}")
        arguments = {} if arguments is None else arguments
        arguments = json.dumps(arguments, ensure_ascii=False) if tokenizer.argument_text else arguments
    return {**call, "function": {**function, "arguments": arguments}}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool with its parameters as a mapping, where they are written as JSON text."""
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _tool(tool["function"])}
    parameters = tool.get("parameters")
    return {**tool, "parameters": parse_json(parameters, "tools")} if isinstance(parameters, str) else tool


def _content(turn: dict[str, Any]) -> str:
    """The text of a turn; the text parts of a list of parts, joined."""
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        other = {part.get("type", "text") for part in parts} - {"text"}
        if other:
            raise RowError(f"a turn that is not text alone (a part is {', '.join(sorted(other))})", "remove the row")
        return "".join(part.get("text") or "" for part in parts)
    return _string(content, "content")


def _string(value: Any, key: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str | None):
        raise RowError(f"a {type(value).__name__} instead of a string in {key}", "write a string")
    return value or ""


def _is_blank(value: Any) -> bool:
    return value is None or (
        isinstance(value, str | list | dict) and not (value.strip() if isinstance(value, str) else value)
    )
