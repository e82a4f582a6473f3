"""The Modelfile of a merged GGUF file, which Ollama reads.

Ollama does not run the Jinja template inside the file. Without a TEMPLATE it takes the nearest of some twenty that it knows,
which loses a default system prompt, and beyond 100 edited characters none at all: the bare question. So a Go template is
derived here from what the Jinja template writes, and given only if it writes the same for other conversations too.
"""

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from qriemann.base.chat_template import render
from qriemann.errors import InputError
from qriemann.gguf.vocabulary import begins_with_bos

_SAID = {"system": "Qsystem", "user": "Quser", "assistant": "Qassistant"}
_TURNS = ("user", "assistant", "user", "assistant", "user")


def go_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Go form of the tokenizer's template; None if role and place alone do not tell what it writes before a message."""
    # Ollama puts it there itself.
    bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""

    def written(roles: Sequence[str]) -> str:
        return render(tokenizer, [{"role": role, "content": _SAID[role]} for role in roles]).removeprefix(bos)

    try:
        # A default system prompt is a part of `alone`, what stands before a first question.
        alone = written(["user"]).partition(_SAID["user"])[0]
        system, first, answer, later, end = re.split("|".join(_SAID.values()), written(["system", *_TURNS[:3]]))

        def derived(roles: Sequence[str]) -> str:
            before = {"system": system, "assistant": answer}
            user = [alone, first] + [later] * len(roles)
            return "".join(before.get(role, user[place]) + _SAID[role] for place, role in enumerate(roles)) + end

        known = all(derived(roles) == written(roles) for roles in (_TURNS[:1], _TURNS, ["system", *_TURNS]))
    except (InputError, ValueError):
        return None
    # Go would take braces for its own, and Ollama the quotes.
    if not known or any(sign in alone + system + first + answer + later + end for sign in ("{{", '"""')):
        return None
    return (
        f'{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "system" }}}}{system}{{{{ else if ne .Role "user" }}}}{answer}'
        f"{{{{ else if eq $i 0 }}}}{alone}{{{{ else if eq $i 1 }}}}{first}{{{{ else }}}}{later}{{{{ end }}}}"
        f"{{{{ .Content }}}}{{{{ end }}}}{end}"
    )


def make_modelfile(
    file: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], asked: Sequence[Mapping[str, str]] = ()
) -> str:
    """The content of a Modelfile for the GGUF file beside it."""
    template = go_template(tokenizer) if tokenizer.chat_template else None
    no_form = (
        "# The chat template has no Go form that is known: Ollama takes the one that it knows for the file, or none."
    )
    lines = [f"FROM ./{file}", no_form if template is None else f'TEMPLATE """{template}"""']
    lines += [f'SYSTEM """{turn["content"]}"""' for turn in asked if turn["role"] == "system"]
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n"
