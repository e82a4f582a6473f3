"""Chat templates: programs that come with a tokenizer, whoever wrote it, rendered with a limit to their time.

Jinja's sandbox keeps a template from the machine, not from looping for ever.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from qriemann.errors import InputError

# A template takes milliseconds, the first time, when it is compiled, tenths of a second.
_SECONDS = 4.0


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """The conversation as the template writes it, up to where the assistant begins.

    Raises:
        InputError: the template refuses the messages, is broken, or takes longer than 4 s.
    """
    try:
        with _stopped_after(_SECONDS):
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except _OutOfTime as error:
        raise InputError(
            f"a chat template must render within {_SECONDS:.0f} s, got one of {tokenizer.name_or_path} that does not; take "
            "another tokenizer"
        ) from error
    # Templates raise TemplateError on purpose and anything else by accident.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"the chat template must accept the conversation, got its refusal: {reason}; correct the messages"
        ) from error


def refuse_endless_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError if the chat template, if there is one, is not through with a short question after 4 s.

    One that loops for certain messages only is not found, nor one that computes a power of astronomic size.
    """
    if tokenizer.chat_template is None:
        return
    try:
        render(tokenizer, [{"role": "user", "content": "?"}])
    except InputError as error:
        # A template may want other messages than these.
        if isinstance(error.__cause__, _OutOfTime):
            raise


class _OutOfTime(BaseException):
    """No Exception, so that nothing on its way takes it for the template's own."""


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raises _OutOfTime from the block's own Python code, in any thread, once it has computed for so long."""
    end = time.thread_time() + seconds

    def check(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise _OutOfTime
        # Line by line in the template alone: its compilation would take ten times as long.
        return check if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)
