"""Prompts as a tokenizer's chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qriemann.errors import InputError


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """The conversation as the template writes it, up to where the assistant begins.

    Raises:
        InputError: the template refuses the messages or is broken.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    # A template raises TemplateError on purpose, and anything else when it is broken.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"the chat template refuses the conversation: {reason}; correct the messages") from error
