"""What Ollama needs beside a merged file."""

from __future__ import annotations

import pytest

from qriemann.gguf.modelfile import derive_turns, make_modelfile
from tests.gguf.models import byte_tokenizer
from tests.recipe_fixtures import CHATML

LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
# Puts what the system says before the first question, and refuses a conversation of another order.
FOLDED = (
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (said if loop.first and said else '') + "
    "m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)


def test_a_template_of_turns_has_a_go_form_that_says_its_default_system_prompt():
    """As Ollama's own for ChatML, but for what the Jinja template says where nobody speaks as the system."""
    assert make_modelfile("tiny-Q8_0.gguf", byte_tokenizer(), ["<|im_end|>", "<|pad|>"]) == (
        "FROM ./tiny-Q8_0.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
        '{{ else }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\n'
        'SYSTEM """Be brief."""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|pad|>"\n'
    )


def test_what_ollama_puts_first_itself_is_left_out():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LLAMA3
    turns = derive_turns(tokenizer, "<|begin|>")
    assert turns.default_system == ""
    assert turns.before_system == "<|start|>system<|stop|>\n\n"
    assert turns.after_user == "<|eot|><|start|>assistant<|stop|>\n\n"
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<|begin|>" + turns.write(messages) == rendered


@pytest.mark.parametrize(
    "template",
    [
        FOLDED,
        CHATML.replace("+ message['content'] +", "+ (message['content'] | upper) +"),
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}",
        CHATML.replace("<|im_end|>", "{{ '{{' }}"),
    ],
)
def test_a_template_without_a_go_form_is_left_to_ollama(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert derive_turns(tokenizer) is None
    text = make_modelfile("tiny-Q8_0.gguf", tokenizer, ["<|im_end|>"])
    assert "TEMPLATE" not in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
