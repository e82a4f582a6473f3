"""What Ollama needs beside a merged file."""

from __future__ import annotations

import re

import jinja2
import pytest
from tokenizers import processors

from qriemann.gguf.modelfile import go_template, make_modelfile
from tests.gguf.models import byte_tokenizer
from tests.recipe_fixtures import CHATML, with_turns

LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
# Puts what the system says into the first question.
FOLDED = (
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (said if loop.first and said else '') + "
    "m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)


def as_jinja(template: str) -> jinja2.Template:
    """The Go template in Jinja, statement by statement."""
    for pattern, form in (
        (r"\{\{ range \$i, \$_ := \.Messages \}\}", "{% for m in messages %}"),
        (r"\{\{ (else )?if (eq|ne) \.Role (\"\w+\") \}\}", r"{% \1if m.role \2 \3 %}"),
        (r"\{\{ (else )?if eq \$i (\d) \}\}", r"{% \1if loop.index0 eq \2 %}"),
        (r"\{\{ \.Content \}\}", "{{ m.content }}"),
        (r"\{\{ else \}\}", "{% else %}"),
        (r"\{\{ end \}\}(?=\{\{ m\.content)", "{% endif %}"),
        (r"\{\{ end \}\}", "{% endfor %}"),
        ("else if", "elif"),
    ):
        template = re.sub(pattern, form, template)
    return jinja2.Environment(keep_trailing_newline=True).from_string(
        template.replace(" eq ", " == ").replace(" ne ", " != ")
    )


@pytest.mark.parametrize(("template", "bos"), [(CHATML, ""), (LLAMA3, "<|begin|>"), (FOLDED, "")])
def test_the_go_template_writes_what_the_jinja_template_writes(template, bos):
    """With the default system prompt where there is one, and without the first token, which Ollama puts there itself."""
    tokenizer = with_turns(byte_tokenizer().backend_tokenizer, template, **({"bos_token": bos} if bos else {}))
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    go = as_jinja(go_template(tokenizer))
    talk = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    for messages in (talk[:1], talk, [*talk[:2], *talk], [{"role": "system", "content": "s"}, *talk]):
        right = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert bos + go.render(messages=messages) == right


def test_a_modelfile_names_the_file_the_template_and_the_stops():
    text = make_modelfile("tiny-Q8_0.gguf", byte_tokenizer(), ["<|im_end|>", "<|pad|>"])
    assert text.startswith('FROM ./tiny-Q8_0.gguf\nTEMPLATE """{{ range $i, $_ := .Messages }}')
    assert text.endswith('assistant\n"""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|pad|>"\n')


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("+ message['content'] +", "+ (message['content'] | upper) +"),
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}",
        CHATML.replace("<|im_end|>", "{{ '{{' }}"),
    ],
)
def test_a_template_without_a_go_form_is_left_to_ollama(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    text = make_modelfile("tiny-Q8_0.gguf", tokenizer, ["<|im_end|>"])
    assert "TEMPLATE" not in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
