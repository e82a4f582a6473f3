"""The trained tokens are the assistant's, end token included, whatever the template says about itself."""

import pytest

from qriemann.data.chat_mask import AssistantTokenizer, RowError
from tests.recipe_fixtures import CHATML, make_tokenizer

# The same conversation format with the generation markers that transformers understands: the independent truth.
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
# Drops what came before "|" in every turn but the last, as templates do with earlier reasoning.
REWRITING = CHATML.replace(
    "message['content'] + '<|im_end|>'",
    "(message['content'] if loop.last else message['content'].split('|')[-1]) + '<|im_end|>'",
)

CONVERSATIONS = {
    "one turn": [("user", "two"), ("assistant", "2")],
    "a system prompt": [("system", "Count."), ("user", "two"), ("assistant", "2")],
    "several turns": [("user", "a"), ("assistant", "b b"), ("user", "c"), ("assistant", "d")],
    "several turns after a system prompt": [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "assistant\nd"),
    ],
    "two assistant turns in a row": [("user", "a"), ("assistant", "b"), ("assistant", "c")],
    "a user turn at the end": [("user", "a"), ("assistant", "b"), ("user", "c")],
}


def as_messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_the_mask_without_markers_equals_that_of_the_same_template_with_markers(turns, tokenizer):
    messages = as_messages(turns)
    ids, mask = AssistantTokenizer(tokenizer).conversation(messages)
    marked = make_tokenizer(MARKED).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == marked["input_ids"]
    assert mask == [bool(bit) for bit in marked["assistant_masks"]]


def test_markers_that_leave_the_end_token_out_are_completed():
    leaky = MARKED.replace(
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    messages = as_messages(CONVERSATIONS["several turns"])
    expected = AssistantTokenizer(make_tokenizer(MARKED)).conversation(messages)
    assert AssistantTokenizer(make_tokenizer(leaky)).conversation(messages) == expected


def test_only_the_completion_is_trained_when_the_prompt_has_assistant_turns(tokenizer):
    messages = as_messages(CONVERSATIONS["several turns"])
    for template in (CHATML, MARKED):
        encoder = AssistantTokenizer(make_tokenizer(template))
        ids, mask = encoder.conversation(messages, context=[1])
        assert tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit]) == "d<|im_end|>"


def test_a_token_that_straddles_the_start_of_a_turn_is_trained(tokenizer):
    # "assistant\n" + "\nx": the two newlines are one token of this vocabulary.
    ids, mask = AssistantTokenizer(tokenizer).conversation(as_messages([("user", "a"), ("assistant", "\nx")]))
    assert tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit]) == "\n\nx<|im_end|>"


def test_a_template_that_rewrites_its_history_is_refused_with_a_remedy():
    encoder = AssistantTokenizer(make_tokenizer(REWRITING))
    with pytest.raises(RowError, match="rewrites those up to turn 2") as caught:
        encoder.conversation(as_messages([("user", "a"), ("assistant", "why|b"), ("user", "c"), ("assistant", "d")]))
    assert "one row for each assistant turn" in caught.value.remedy
    _, mask = encoder.conversation(as_messages([("user", "a"), ("assistant", "why|b")]))
    assert sum(mask) == len("why|b") + 1


def test_a_conversation_that_opens_with_the_assistant_is_refused(tokenizer):
    with pytest.raises(RowError, match="opens with the assistant"):
        AssistantTokenizer(tokenizer).conversation(
            as_messages([("assistant", "hi"), ("user", "a"), ("assistant", "b")])
        )


def test_a_plain_completion_is_trained_with_the_end_token_appended_once(tokenizer):
    encoder = AssistantTokenizer(tokenizer)
    for completion in ("a", "a<|im_end|>"):
        ids, mask = encoder.completion("q: ", completion)
        assert tokenizer.decode(ids) == "q: a<|im_end|>"
        assert mask == [False] * 3 + [True] * 2
