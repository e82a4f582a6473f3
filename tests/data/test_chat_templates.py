"""Stock chat templates, as they behave: what is trained is what the assistant says, and the token that ends its turn.

Each template stands beside the conversation written out by hand, token for token, with the trained parts marked.
"""

from importlib.resources import files

import pytest

from qriemann.base.chat_template import end_tokens
from qriemann.data.account import take_account
from qriemann.data.chat_mask import AssistantTokenizer
from qriemann.data.defects import find_defects
from qriemann.data.sources import load_sources
from qriemann.data.tokenized import IGNORED, tokenize_rows
from qriemann.errors import InputError
from tests.data.test_chat_mask import as_messages
from tests.models import tiny_llama
from tests.recipe_fixtures import CHATML, make_tokenizer


def published(name):
    """A family's template, of which TRL carries a copy."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")


# Where TRL carries none: the system text stands in the user turn that is still to be answered, and nowhere once it is.
MISTRAL_V03 = (
    "{{ bos_token }}{% set given = messages[0]['role'] == 'system' %}"
    "{% for turn in (messages[1:] if given else messages) %}"
    "{% if turn['role'] == 'user' %}"
    "{{ '[INST] ' + (messages[0]['content'] + '\n\n' if given and loop.last else '') + turn['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + turn['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# (template, first token, end of text, further tokens)
FAMILIES = {
    "llama-3.1": (
        published("llama3_1"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "qwen3": (published("qwen3"), None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>", "<think>", "</think>"]),
    "gemma-3": (published("gemma3"), "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral-v0.3": (MISTRAL_V03, "<s>", "</s>", ["[INST]", "[/INST]"]),
    "phi-3.5": (published("phi3_5"), "<s>", "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "smollm2": (CHATML, None, "<|im_end|>", ["<|im_start|>"]),
}

ONE = [("user", "two"), ("assistant", "2")]
SEVERAL = [("user", "a"), ("assistant", "b\n\nb"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")]
SYSTEM = ("system", "Count.")

_DATES = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
_ASKED = "<|start_header_id|>user<|end_header_id|>\n\n"
_ANSWERS = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
_MODEL = "<end_of_turn>\n<start_of_turn>model\n"
_CHATML = "<|im_end|>\n<|im_start|>assistant\n"

# Family, turns, and the row as written by hand: context and trained text by turns. For SmolLM2 see test_chat_mask.py.
ROWS = {
    "llama-3.1, several turns after a system message": (
        "llama-3.1",
        [SYSTEM, *SEVERAL],
        [
            f"<|begin_of_text|>{_DATES}Count.<|eot_id|>{_ASKED}a{_ANSWERS}",
            "b\n\nb<|eot_id|>",
            f"{_ASKED}c{_ANSWERS}",
            "d<|eot_id|>",
            f"{_ASKED}e{_ANSWERS}",
            "f<|eot_id|>",
        ],
    ),
    "llama-3.1, white space around the answer": (
        "llama-3.1",
        [("user", "a"), ("assistant", " b\n"), ("user", "c")],
        [
            f"<|begin_of_text|>{_DATES}<|eot_id|>{_ASKED}a{_ANSWERS}",
            "b<|eot_id|>",
            f"{_ASKED}c<|eot_id|>",
        ],
    ),
    "llama-3.1, an answer that quotes the end token": (
        "llama-3.1",
        [("user", "a"), ("assistant", "b<|eot_id|>c"), ("user", "d")],
        [
            f"<|begin_of_text|>{_DATES}<|eot_id|>{_ASKED}a{_ANSWERS}",
            "b<|eot_id|>c<|eot_id|>",
            f"{_ASKED}d<|eot_id|>",
        ],
    ),
    "qwen3, one turn": (
        "qwen3",
        ONE,
        [f"<|im_start|>user\ntwo{_CHATML}", "<think>\n\n</think>\n\n2<|im_end|>", "\n"],
    ),
    "qwen3, a system message and reasoning": (
        "qwen3",
        [SYSTEM, ("user", "two"), ("assistant", "<think>\none, two\n</think>\n\n2")],
        [
            f"<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\ntwo{_CHATML}",
            "<think>\none, two\n</think>\n\n2<|im_end|>",
            "\n",
        ],
    ),
    "gemma-3, several turns after a system message": (
        "gemma-3",
        [SYSTEM, *SEVERAL],
        [
            f"<bos><start_of_turn>user\nCount.\n\na{_MODEL}",
            "b\n\nb<end_of_turn>",
            f"\n<start_of_turn>user\nc{_MODEL}",
            "d<end_of_turn>",
            f"\n<start_of_turn>user\ne{_MODEL}",
            "f<end_of_turn>",
            "\n",
        ],
    ),
    "mistral-v0.3, several turns": (
        "mistral-v0.3",
        SEVERAL,
        ["<s>[INST] a[/INST]", " b\n\nb</s>", "[INST] c[/INST]", " d</s>", "[INST] e[/INST]", " f</s>"],
    ),
    "phi-3.5, several turns after a system message": (
        "phi-3.5",
        [SYSTEM, *SEVERAL],
        [
            "<|system|>\nCount.<|end|>\n<|user|>\na<|end|>\n<|assistant|>\n",
            "b\n\nb<|end|>",
            "\n<|user|>\nc<|end|>\n<|assistant|>\n",
            "d<|end|>",
            "\n<|user|>\ne<|end|>\n<|assistant|>\n",
            "f<|end|>",
            "\n<|endoftext|>",
        ],
    ),
}


def tokenizer_of(family):
    template, first, end, further = FAMILIES[family]
    tokenizer = make_tokenizer(template)
    named = {"eos_token": end, "additional_special_tokens": further}
    tokenizer.add_special_tokens(named if first is None else {**named, "bos_token": first})
    return tokenizer


def by_turns(ids, trained, tokenizer):
    """Text of the runs of tokens that are trained and that are not."""
    runs = []
    for index, token in enumerate(ids):
        if index == 0 or trained[index] != trained[index - 1]:
            runs.append([])
        runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(("family", "turns", "expected"), ROWS.values(), ids=ROWS)
def test_the_trained_tokens_are_the_assistants_and_the_end_of_its_turn(family, turns, expected, write_rows):
    tokenizer = tokenizer_of(family)
    path = write_rows([{"messages": as_messages(turns)}])
    rows = tokenize_rows(*load_sources(str(path)), tokenizer)
    ids, labels = rows.train[0]["input_ids"], rows.train[0]["labels"]
    trained = [label != IGNORED for label in labels]
    assert by_turns(ids, trained, tokenizer) == expected
    # The first of the hand-written parts is context, so that an inverted mask would not pass.
    assert not trained[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_is_known_and_no_defect_is_found(family, write_rows):
    tokenizer = tokenizer_of(family)
    rows = tokenize_rows(*load_sources(str(write_rows([{"messages": as_messages(ONE)}]))), tokenizer)
    model = tiny_llama(vocabulary=len(tokenizer))
    assert find_defects(take_account(rows, tokenizer, model), tokenizer) == []
    last = [label for label in rows.train[0]["labels"] if label != IGNORED][-1]
    assert last in end_tokens(tokenizer, model)


def test_qwen3_without_thinking_trains_the_answer_alone():
    tokenizer = tokenizer_of("qwen3")
    ids, mask = AssistantTokenizer(tokenizer).conversation(as_messages(ONE), {"enable_thinking": False})
    assert by_turns(ids, mask, tokenizer) == [
        f"<|im_start|>user\ntwo{_CHATML}<think>\n\n</think>\n\n",
        "2<|im_end|>",
        "\n",
    ]


def test_qwen3_reads_each_answer_of_a_conversation_after_the_history_as_it_will_be_then(write_rows):
    path = write_rows([{"messages": as_messages(turns)} for turns in (ONE, SEVERAL)])
    tokenizer = tokenizer_of("qwen3")
    data = tokenize_rows(*load_sources(str(path)), tokenizer)
    rows = [by_turns(row["input_ids"], [label != IGNORED for label in row["labels"]], tokenizer) for row in data.train]
    empty = "<think>\n\n</think>\n\n"
    history = f"<|im_start|>user\na{_CHATML}b\n\nb<|im_end|>\n<|im_start|>user\nc{_CHATML}"
    assert rows == [
        [f"<|im_start|>user\ntwo{_CHATML}", f"{empty}2<|im_end|>", "\n"],
        [f"<|im_start|>user\na{_CHATML}", f"{empty}b\n\nb<|im_end|>", "\n"],
        [history, f"{empty}d<|im_end|>", "\n"],
        [f"{history}d<|im_end|>\n<|im_start|>user\ne{_CHATML}", f"{empty}f<|im_end|>", "\n"],
    ]
    assert [
        notice
        for notice in data.notices
        if "1 of 2 rows" in notice and "become one for each answer, 4 in all" in notice
    ]


def test_a_conversation_that_became_several_rows_is_held_out_whole(write_rows):
    talks = [[(role, f"{text}{number}") for role, text in SEVERAL] for number in range(6)]
    path = write_rows([{"messages": as_messages(turns)} for turns in talks])
    tokenizer = tokenizer_of("qwen3")
    data = tokenize_rows(*load_sources(str(path)), tokenizer, eval_size=2)
    assert (len(data.train), len(data.held_out)) == (12, 6)
    # The first question names the conversation.
    first = [
        {tokenizer.decode(row["input_ids"]).split("\n")[1] for row in part} for part in (data.train, data.held_out)
    ]
    assert [len(names) for names in first] == [4, 2]
    assert not first[0] & first[1]


# What no sequence of tokens is right for, and what the line says of it.
REFUSED = {
    "mistral-v0.3, a system message": ("mistral-v0.3", [SYSTEM, *ONE], "turn 2 changes.*into the first user turn"),
    "gemma-3, two questions in a row": ("gemma-3", [ONE[0], *ONE], "roles must alternate"),
}


@pytest.mark.parametrize(("family", "turns", "line"), REFUSED.values(), ids=REFUSED)
def test_what_a_template_cannot_carry_is_refused_by_its_row(family, turns, line, write_rows):
    path = write_rows([{"messages": as_messages(ONE)}, {"messages": as_messages(turns)}])
    with pytest.raises(InputError, match=line) as caught:
        tokenize_rows(*load_sources(str(path)), tokenizer_of(family))
    assert "row 2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma3"])
def test_the_markers_of_trls_training_templates_are_kept_and_reach_into_no_other_turn(family):
    tokenizer = make_tokenizer(published(f"{family}_training"))
    ids, mask = AssistantTokenizer(tokenizer).conversation(as_messages(SEVERAL))
    marked = tokenizer.apply_chat_template(
        as_messages(SEVERAL), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == marked["input_ids"]
    # The end token apart, which some markers leave out.
    assert all(bit >= marker for bit, marker in zip(mask, marked["assistant_masks"], strict=True))
    opened = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert not any(bit for token, bit in zip(ids, mask, strict=True) if token == opened)


def test_a_prompt_may_hold_answers_that_a_marked_template_rewrites():
    # As Qwen3's, with markers: earlier answers lose what stands before the bar.
    rewriting = CHATML.replace(
        "message['content'] + '<|im_end|>'",
        "(message['content'] if loop.last else message['content'].split('|')[-1]) + '<|im_end|>'",
    )
    marked = rewriting.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + (",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% generation %}{{ (",
    )
    marked = marked.replace("+ '<|im_end|>' + '\n' }}", "+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}")
    talk = as_messages([("user", "a"), ("assistant", "why|b"), ("user", "c"), ("assistant", "d")])
    tokenizer = make_tokenizer(marked)
    ids, mask = AssistantTokenizer(tokenizer).conversation(talk, context=[1])
    assert by_turns(ids, mask, tokenizer)[-2:] == ["d<|im_end|>", "\n"]
    assert sum(mask) == 2
