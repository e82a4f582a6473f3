"""A tokenizer's chat template: which one it is, the prompts that it writes, and what it says when it fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from qriemann.base.checks import load_tokenizer
from qriemann.errors import InputError


def template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's chat templates; several where they have names, such as one for tools, none for a base model."""
    templates = tokenizer.chat_template or {}
    return list(templates.values()) if isinstance(templates, dict) else [templates]


def explain(error: BaseException) -> tuple[str, str]:
    """What a chat template said when it failed, in one line, and the remedy."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        raise InputError(
            f"the chat template is not valid Jinja: {reason} (line {error.lineno}); correct it, or set chat_template_path"
        ) from error
    # A template raises TemplateError itself on purpose, and anything else where a turn lacks what it reads.
    return reason, "correct the turns" + ("" if type(error) is TemplateError else ", or the template")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """The conversation as the template writes it, up to where the assistant begins."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:
        reason, _ = explain(error)
        raise InputError(f"the chat template refuses the conversation: {reason}; correct the messages") from error


def adjust_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, eos_token: str | None = None, chat_template_path: str | None = None
) -> None:
    """Gives the tokenizer the end token and chat template that `SFTTrainer` would give it after tokenization.

    `chat_template_path` is a .jinja file, or a tokenizer whose template is taken; None keeps its own.
    """
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise InputError(f"eos_token must be in the tokenizer's vocabulary, got {eos_token!r}; check its spelling")
        tokenizer.eos_token = eos_token
    if chat_template_path is None:
        return
    path = Path(chat_template_path)
    try:
        is_file = path.suffix in (".jinja", ".j2")
        template = (
            path.read_text("utf-8") if is_file else load_tokenizer(str(path), trust_remote_code=False).chat_template
        )
    except FileNotFoundError as error:
        raise InputError(f"chat_template_path: {path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"chat_template_path {path} is neither a .jinja file nor a tokenizer: {str(error).splitlines()[0]}"
        ) from error
    if not template:
        raise InputError(f"chat_template_path must name a chat template, got a tokenizer without one at {str(path)!r}")
    tokenizer.chat_template = template


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after what an assistant says; None where there is none."""
    if not tokenizer.chat_template:
        return None
    said = "qriemann"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    # A template may refuse these turns; rows that it refuses are reported when they are rendered.
    except Exception:
        return None
    after = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in special_ids(tokenizer)), None)


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> list[int]:
    """The tokens that end a turn or a text: the tokenizer's, the generation config's and the chat template's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [
        tokenizer.eos_token_id,
        end_of_turn(tokenizer),
        *(configured if isinstance(configured, list) else [configured]),
    ]
    return sorted({end for end in ends if end is not None})


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that stand for no text."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
