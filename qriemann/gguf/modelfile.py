"""The Modelfile of a merged GGUF file, which Ollama reads.

Ollama writes conversations by a Go template and does not run the Jinja one inside the file. The Go template is derived here
from what the Jinja template writes, and is given only if it writes the same for conversations that it was not derived from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qriemann.base.chat_template import render
from qriemann.errors import InputError

_SYSTEM, _USER, _ASSISTANT, _NEXT = "Qsystem", "Quser", "Qassistant", "Qnext"


@dataclass(frozen=True)
class Turns:
    """What a template writes around what is said.

    Attributes:
        before_system, after_system, before_user, after_user, after_assistant: around each message; where the assistant begins
            is part of `after_user`.
        default_system: what it says as the system when nobody does.
    """

    before_system: str
    after_system: str
    before_user: str
    after_user: str
    after_assistant: str
    default_system: str = ""

    def write(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as the Go template writes it."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        around = {
            "system": (self.before_system, self.after_system),
            "user": (self.before_user, self.after_user),
            "assistant": ("", self.after_assistant),
        }
        return "".join(around[m["role"]][0] + m["content"] + around[m["role"]][1] for m in messages)

    def go(self) -> str:
        """The Go template; nothing in it trims what stands beside it."""
        said = "{{ .Content }}"
        system, user = (f'{{{{ {test} eq .Role "{role}" }}}}' for test, role in (("if", "system"), ("else if", "user")))
        return (
            f"{{{{ range .Messages }}}}{system}{self.before_system}{said}{self.after_system}"
            f"{user}{self.before_user}{said}{self.after_user}{{{{ else }}}}{said}{self.after_assistant}"
            "{{ end }}{{ end }}"
        )


def derive_turns(tokenizer: PreTrainedTokenizerBase, bos: str = "") -> Turns | None:
    """What the tokenizer's template writes around messages; None if no such rule writes what it writes.

    Args:
        bos: what the template begins with and Ollama puts there itself.
    """
    roles = {_SYSTEM: "system", _ASSISTANT: "assistant"}
    conversations = [
        [{"role": roles.get(content, "user"), "content": content} for content in contents]
        for contents in (
            (_SYSTEM, _USER, _ASSISTANT, _NEXT),
            (_USER,),
            (_SYSTEM, _USER),
            (_USER, _ASSISTANT, _NEXT),
            (_USER, _ASSISTANT, _NEXT, _ASSISTANT, _USER),
        )
    ]
    try:
        written = [render(tokenizer, messages).removeprefix(bos) for messages in conversations]
    except InputError:
        return None
    whole, plain, *_ = written
    before_system, _, rest = whole.partition(_SYSTEM)
    to_user, _, rest = rest.partition(_USER)
    after_user, _, rest = rest.partition(_ASSISTANT)
    to_next = rest.partition(_NEXT)[0]
    # Go would take braces for its own, and Ollama the quotes.
    if "{{" in whole or '"""' in whole:
        return None
    # One message's end and the next one's beginning stand side by side: each way to cut them is tried, first those in which a
    # user's message begins as the system's does.
    cuts = sorted(range(len(to_user) + 1), key=lambda cut: -_shared(to_user[cut:], before_system))
    for cut in cuts:
        after_system, before_user = to_user[:cut], to_user[cut:]
        if not to_next.endswith(before_user):
            continue
        default = plain.partition(_USER)[0].removesuffix(before_user)
        default = default.removeprefix(before_system).removesuffix(after_system)
        turns = Turns(before_system, after_system, before_user, after_user, to_next.removesuffix(before_user), default)
        if all(turns.write(messages) == text for messages, text in zip(conversations, written, strict=True)):
            return turns
    return None


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def make_modelfile(file: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, bos: str = "") -> str:
    """The content of a Modelfile.

    Args:
        file: name of the GGUF file beside it.
        tokenizer: of the training.
        stops: the tokens that end a turn.
        bos: as in `derive_turns`.
    """
    lines = [f"FROM ./{file}"]
    turns = derive_turns(tokenizer, bos) if tokenizer.chat_template else None
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.go()}"""')
        if turns.default_system:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    else:
        lines.append("# No Go form of the chat template is known: Ollama takes the one that it knows for the file.")
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n"
