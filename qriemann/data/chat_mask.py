"""Which tokens of a row are trained: the assistant's turns, found by rendering the chat template.

A template without `{% generation %}` markers does not say where an assistant's turn begins, but rendering does: the
prompt of turn i is the conversation before it plus the generation prompt, and the turn ends where the conversation up to and
including it ends. Both are prefixes of the whole conversation, unless the template rewrites earlier turns. Where it rewrites
answers (Qwen3 drops the reasoning of earlier turns), no sequence is right for every turn, and each turn becomes a row of its
own, as the model will read it. Where it rewrites a question once it is answered (Mistral's system message), the row is
refused. What a template writes after the last end token only because nothing follows (Phi's end of text) belongs to no turn.

TRL's `assistant_only_loss` instead replaces the template of the families it knows and fails on the others, such as SmolLM2.
"""

import datetime
import functools
import json
import re
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from qriemann.base.chat_template import end_of_turn, explain, special_ids, template_texts
from qriemann.upstream import today_is

Message = dict[str, Any]

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: The date that templates see. With the real date, a run that is resumed tomorrow would have other rows.
TODAY = datetime.date(2025, 1, 1)


class RowError(ValueError):
    """A row that cannot be trained on: the problem and its remedy. The caller adds the row's number."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy


class RewrittenHistoryError(RowError):
    """The template writes earlier answers differently once later turns follow."""


#: Token ids of a row, and whether each is trained.
Example = tuple[list[int], list[bool]]
#: A label that no loss counts.
IGNORED = -100


class AssistantTokenizer:
    """Token ids of a row, and for each token whether it belongs to an assistant's turn.

    The end token of a turn is trained, because the model stops with it. White space between it and the next turn is not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special_ids = special_ids(tokenizer)
        texts = " ".join(template_texts(tokenizer))
        self.writes_calls, self.writes_date = "tool_calls" in texts, "strftime_now" in texts
        end = end_of_turn(tokenizer)
        self.end: str | None = None if end is None else tokenizer.convert_ids_to_tokens(end)
        self._ends = {end, tokenizer.eos_token_id}

    @functools.cached_property
    def argument_text(self) -> bool:
        """Whether the template takes the arguments of tool calls as JSON text alone, as DeepSeek's do."""

        def takes(arguments: Any) -> bool:
            call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
            answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
            return self._text([{"role": "user", "content": "?"}, answer], {}) is not None

        return not takes({"a": 1}) and takes('{"a": 1}')

    def conversations(
        self, messages: Sequence[Message], options: dict[str, Any], context: Collection[int]
    ) -> list[Example]:
        """The rows that train every turn of a conversation: one, or one for each turn if the template rewrites history."""
        try:
            return [self.conversation(messages, options, context)]
        except RewrittenHistoryError:
            answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
            return [
                self.conversation(messages[: i + 1], options, [j for j in answers if j < i])
                for i in answers
                if i not in context
            ]

    def conversation(
        self,
        messages: Sequence[Message],
        options: dict[str, Any] | None = None,
        context: Collection[int] = (),
        *,
        whole: bool = False,
    ) -> Example:
        """Token ids and assistant mask; a token that straddles the start of a turn is trained.

        Args:
            options: what else the chat template takes, such as tools.
            context: indices of answers that are not trained, such as those of a prompt.
            whole: train every token, the template's own included, but for the answers in `context`.
        """
        options = options or {}
        text = self._render(messages, options)
        ids = self._encode(text)
        if not whole and _GENERATION_MARKER.search(self.tokenizer.get_chat_template(tools=options.get("tools"))):
            return ids, self._mask_by_markers(messages, text, ids, context, options)
        mask = [whole] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and (index in context) == whole:
                start, stop = self._span(messages, index, text, ids, options)
                mask[start:stop] = [not whole] * (stop - start)
        return ids, mask

    def unwritten(self, messages: Sequence[Message], options: dict[str, Any], *, split: bool = False) -> set[str]:
        """The keys of turns, and "tools", that change nothing in what the template writes.

        Cost: one rendering for each of those keys; none where turns have role and content alone.
        """
        names = _names(messages) - {"role", "content"} | ({"tools"} if options.get("tools") else set())
        if split:
            parts = [messages[: i + 1] for i, turn in enumerate(messages) if turn["role"] == "assistant"]
            return names.intersection(
                *(self.unwritten(part, options) | (names - {"tools"} - _names(part)) for part in parts)
            )
        removed: set[str] = set()
        written = self._text(messages, options) if names else None
        for name in sorted(names):
            left = [{key: turn[key] for key in turn if key not in removed | {name}} for turn in messages]
            offered = options | {"tools": None} if "tools" in removed | {name} else options
            if self._text(left, offered) == written:
                removed.add(name)
        return removed

    def answers(self, messages: Sequence[Message], ids: list[int], options: dict[str, Any]) -> dict[int, range]:
        """The tokens of each answer in one row made of a conversation; answers that this row rewrites are left out."""
        ends = range(len(messages), 0, -1)
        texts = ((end, self._text(messages[:end], options)) for end in ends)
        turns, text = next(((end, text) for end, text in texts if text and self._encode(text) == ids), (0, ""))
        found = {}
        for index in (i for i, turn in enumerate(messages[:turns]) if turn["role"] == "assistant"):
            with suppress(RowError):
                found[index] = range(*self._span(messages[:turns], index, text, ids, options))
        return found

    def completion(self, prompt: str, completion: str) -> Example:
        """Token ids and mask of two plain strings; the end-of-sequence token is appended to the completion and trained."""
        prompt_ids = self.tokenizer(prompt)["input_ids"] if prompt else []
        ids = self._with_end(self.tokenizer(prompt + completion)["input_ids"])
        # A tokenizer that appends its own end token does so to the prompt alone as well.
        if prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id:
            prompt_ids = prompt_ids[:-1]
        start = common_prefix_length(prompt_ids, ids)
        return ids, [index >= start for index in range(len(ids))]

    def text(self, text: str) -> Example:
        """Token ids and mask of a text without roles: every token is trained, the appended end token included."""
        ids = self._with_end(self.tokenizer(text)["input_ids"])
        return ids, [True] * len(ids)

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _render(self, messages: Sequence[Message], options: dict[str, Any], **more: Any) -> Any:
        try:
            with today_is(TODAY) if self.writes_date else nullcontext():
                return self.tokenizer.apply_chat_template(list(messages), **{"tokenize": False, **options, **more})
        except Exception as error:
            reason, remedy = explain(error)
            raise RowError(f"a conversation that the chat template refuses (it says: {reason})", remedy) from error

    def _text(self, messages: Sequence[Message], options: dict[str, Any]) -> str | None:
        """The conversation as the template writes it; None where it refuses."""
        try:
            return self._render(messages, options)
        except RowError:
            return None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _span(
        self, messages: Sequence[Message], index: int, text: str, ids: list[int], options: dict[str, Any]
    ) -> tuple[int, int]:
        """Where the tokens of an answer start and stop."""
        if index == 0:
            raise RowError("a conversation that opens with the assistant", "put a user turn first or drop that turn")
        prompt = self._render(messages[:index], options, add_generation_prompt=True)
        turn = self._up_to_end(self._render(messages[: index + 1], options), len(prompt), messages[index])
        if not text.startswith(turn):
            raise RewrittenHistoryError(
                f"turns that the chat template changes once others follow (it rewrites those up to turn {index + 1})",
                "split it into one row for each assistant turn",
            )
        if not turn.startswith(prompt):
            if turn.startswith(self._render(messages[:index], options)):
                raise RowError(
                    f"an answer that the chat template asks for in words that it then leaves out (turn {index + 1})",
                    "name another template with chat_template_path",
                )
            raise RowError(
                f"a question that the chat template renders differently once it is answered (turn {index} changes)",
                "put a system turn's text into the first user turn, or name another template with chat_template_path",
            )
        start = common_prefix_length(self._encode(prompt), ids)
        stop = len(ids) if turn == text else common_prefix_length(self._encode(turn), ids)
        # White space after the end token belongs to no turn.
        last = next((i for i in range(stop - 1, start - 1, -1) if ids[i] in self.special_ids), None)
        return start, stop if last is None or self.tokenizer.decode(ids[last + 1 : stop]).strip() else last + 1

    def _up_to_end(self, turn: str, start: int, said: Message) -> str:
        """The text through the end token of its last turn, which begins at `start` and may quote that token."""
        if self.end is None:
            return turn
        quoted = json.dumps(said, ensure_ascii=False, default=str) if len(said) > 2 else str(said.get("content"))
        stops = [match.end() for match in re.finditer(re.escape(self.end), turn[start:])][quoted.count(self.end) :]
        return turn[: start + stops[0]] if stops else turn

    def _mask_by_markers(
        self,
        messages: Sequence[Message],
        text: str,
        ids: list[int],
        context: Collection[int],
        options: dict[str, Any],
    ) -> list[bool]:
        """The mask of a template with generation markers, with the end tokens that the markers leave out."""
        rendered = self._render(messages, options, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask = [bool(bit) for bit in rendered["assistant_masks"]]
        if rendered["input_ids"] != ids or len(mask) != len(ids):
            raise RowError("tokens that the template's generation markers do not line up with", "use a fast tokenizer")
        ended = False
        for index in range(1, len(ids)):
            before = ids[index - 1]
            # A line feed after the end token may be marked as well; what follows it belongs to the next turn.
            ended = mask[index - 1] and (
                before in self._ends or (ended and not self.tokenizer.decode([before]).strip())
            )
            if mask[index - 1] and ids[index] in self.special_ids and before not in self.special_ids and not ended:
                mask[index] = True
        # What comes before the first trained answer may be written differently once more follows; only its length counts.
        answers = (i for i, turn in enumerate(messages) if turn["role"] == "assistant" and i not in context)
        first = next(answers, len(messages))
        if any(index < first for index in context):
            prompt_ids = self._encode(self._render(messages[:first], options, add_generation_prompt=True))
            start = common_prefix_length(prompt_ids, ids)
            mask[:start] = [False] * start
        for index in (i for i in context if i > first):
            start, stop = self._span(messages, index, text, ids, options)
            mask[start:stop] = [False] * (stop - start)
        return mask


def _names(messages: Sequence[Message]) -> set[str]:
    return {name for turn in messages for name in turn}


def common_prefix_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(ids), len(others)))
