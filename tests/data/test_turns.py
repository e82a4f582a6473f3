"""What a row says of its turns is honoured, whichever tool wrote it; what is not trained is counted."""

import json

import pytest
from datasets import Dataset

from qriemann.data.sources import Source, load_sources
from qriemann.data.tokenized import IGNORED, fingerprint, tokenize_rows
from qriemann.errors import InputError
from tests.data.test_chat_mask import MARKED, REWRITING
from tests.recipe_fixtures import CHATML, chat_rows, make_tokenizer

# Writes tools, tool calls as JSON and reasoning, as Qwen's templates do.
TOOLS = (
    "{% if tools %}{{ '<tools>' + (tools | tojson) + '</tools>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read(rows, template=CHATML, **options):
    return tokenize_rows(Source.of(rows, "rows"), None, make_tokenizer(template), **options)


def shown(data, template=CHATML):
    """The rows as text, the trained tokens in brackets."""
    tokenizer, texts = make_tokenizer(template), []
    for row in data.train:
        text, inside = "", False
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            if (label != IGNORED) != inside:
                inside = not inside
                text += "[" if inside else "]"
            text += tokenizer.decode([token])
        texts.append(text + "]" * inside)
    return texts


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def ask(answer="b", **more):
    return [turn("user", "a"), turn("assistant", answer, **more)]


PIRATE = turn("system", "Be a pirate.")
EARLIER = [turn("user", "hi"), turn("assistant", "hello")]
SYSTEMS = {
    "alpaca": {"instruction": "a", "output": "b", "system": "Be a pirate."},
    "alpaca with input": {"instruction": "a", "input": "", "output": "b", "system_prompt": "Be a pirate."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "system": "Be a pirate.",
    },
    "messages": {"messages": ask(), "system": "Be a pirate."},
    "prompt and completion": {"prompt": ask()[:1], "completion": ask()[1:], "system": "Be a pirate."},
    "a completion that is text": {"prompt": ask()[:1], "completion": "b", "system": "Be a pirate."},
}


@pytest.mark.parametrize("row", SYSTEMS.values(), ids=SYSTEMS)
def test_the_column_of_a_system_prompt_is_the_system_turn(row):
    data = read([row])
    assert fingerprint(data.train) == fingerprint(read([{"messages": [PIRATE, *ask()]}]).train)
    assert data.unused == {}


@pytest.mark.parametrize(
    "history",
    [[["hi", "hello"]], EARLIER, '[["hi", "hello"]]', [("hi", "hello")]],
    ids=["pairs", "turns", "JSON", "tuples"],
)
def test_the_history_of_an_alpaca_row_comes_first(history):
    data = read([{"instruction": "a", "output": "b", "history": history, "system": "Be a pirate."}])
    assert fingerprint(data.train) == fingerprint(read([{"messages": [PIRATE, *EARLIER, *ask()]}]).train)


def test_a_base_without_a_template_reads_system_and_history_as_text():
    row = {"instruction": "a", "output": "b", "history": [["hi", "hello"]], "system": "S."}
    assert shown(read([row], None), None) == ["S.\n\nhi\n\nhello\n\na\n\n[b<|im_end|>]"]


def test_a_system_turn_in_the_conversation_comes_before_a_column_which_is_then_named():
    data = read([{"messages": [PIRATE, *ask()], "system": "Be brief."}, {"messages": ask(), "system": ""}])
    assert "pirate" in shown(data)[0]
    assert data.unused == {"system": 1}


MARKS = [
    ("weight", 0, 1),
    ("weight", 0.0, 1.0),
    ("train", False, True),
    ("training", False, None),
    ("loss", False, True),
]


@pytest.mark.parametrize("template", [CHATML, MARKED, REWRITING], ids=["plain", "generation markers", "rewriting"])
@pytest.mark.parametrize(("key", "off", "on"), MARKS)
def test_an_answer_that_is_marked_is_context(key, off, on, template):
    turns = [*ask("wrong", **{key: off}), turn("user", "no"), turn("assistant", "right", **{key: on})]
    data = read([{"messages": turns}], template)
    (text,) = shown(data, template)
    assert text.count("[") == 1
    assert "[right<|im_end|>]" in text
    assert "wrong<|im_end|>" in text
    assert any("1 of 1 rows" in notice and "context only" in notice for notice in data.notices)
    assert data.unused == {}


def test_a_marked_answer_is_context_where_all_tokens_are_trained_and_in_the_middle():
    turns = [*ask("one"), *ask("two", weight=0), *ask("three")]
    for loss_on, trained in (("all", 2), ("assistant", 2)):
        (text,) = shown(read([{"messages": turns}], loss_on=loss_on))
        assert text.count("[") == trained
        assert "]two<|im_end|>[" in text or "two<|im_end|>" in text.split("]")[1]


def test_a_mark_that_is_neither_yes_nor_no_is_named():
    data = read([{"messages": ask(weight=0.5)}, {"messages": [turn("user", "a", train=True), *ask()[1:]]}])
    assert data.unused == {"messages[].weight": 1, "messages[].train": 1}
    assert data.notices == ["not used: messages[].weight (1 of 2 rows), messages[].train (1 of 2 rows)"]


REJECTED = {
    "KTO": {"prompt": "a", "completion": "bad", "label": False},
    "KTO from CSV": {"prompt": "a", "completion": "bad", "label": "False"},
    "KTO with turns": {"prompt": ask()[:1], "completion": ask("bad")[1:], "label": False},
    "LLaMA-Factory": {"messages": ask("bad"), "kto_tag": False},
    "a row of weight 0": {"messages": ask("bad"), "weight": 0},
    "a row that is not to be trained": {"instruction": "a", "output": "bad", "train": False},
}


@pytest.mark.parametrize("row", REJECTED.values(), ids=REJECTED)
def test_a_row_that_says_it_is_not_to_be_learnt_is_refused_or_left_out(row):
    good = {
        key: True if key in ("label", "kto_tag", "train") else value for key, value in row.items() if key != "weight"
    }
    with pytest.raises(InputError, match=r"1 of 2 rows of rows say that .*row 2.*--allow rejected-rows") as caught:
        read([good, row])
    assert "\n" not in str(caught.value)
    data = read([good, row], allow=["rejected-rows"])
    assert len(data.train) == 1
    assert any("left out" in notice for notice in data.notices)
    assert data.unused == {}
    with pytest.raises(InputError, match="2 of 2"):
        read([row, row], allow=["rejected-rows"])


def test_a_label_that_rates_nothing_is_named_and_trained():
    rows = [{"text": "a", "label": False}, {"text": "b", "label": 1}]
    assert read(rows).unused == {"label": 2}
    assert read([{"messages": ask(), "label": "sports"}]).unused == {"label": 1}
    assert read([{"messages": ask(), "label": 0}]).unused == {"label": 1}


def test_every_column_that_is_not_trained_is_named_once_with_its_rows():
    rows = [
        {"messages": ask(), "rejected_response": "go away", "score": 0.1, "images": []},
        {"messages": ask(), "score": None, "images": ["a.png"]},
        {"messages": ask(), "score": 0},
    ]
    data = tokenize_rows(Source.of(rows[:2], "rows"), Source.of(rows[2:], "more"), make_tokenizer())
    assert data.unused == {"rejected_response": 1, "score": 2, "images": 1}
    (line,) = [notice for notice in data.notices if notice.startswith("not used")]
    assert line == "not used: rejected_response (1 of 3 rows), score (2 of 3 rows), images (1 of 3 rows)"


def test_columns_beside_tokens_are_named():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}]
    for source in (Source.of(rows, "rows"), Source(Dataset.from_list(rows), "rows")):
        data = tokenize_rows(source, None, make_tokenizer())
        assert data.train[0] == {"input_ids": [1, 2], "labels": [-100, 2]}
        assert data.unused == {"attention_mask": 1}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_reasoning_is_trained_where_the_template_writes_it_and_named_where_not(key):
    rows = [{"messages": ask("4", **{key: "2 and 2"})}, {"messages": ask("4", **{key: None})}]
    data = read(rows)
    assert data.unused == {f"messages[].{key}": 1}
    assert any(f"does not write messages[].{key} (1 of 2 rows)" in notice for notice in data.notices)
    written = read(rows, TOOLS)
    assert "[<think>2 and 2</think>4<|im_end|>]" in shown(written, TOOLS)[0]
    assert written.unused == {}


def test_reasoning_of_an_earlier_answer_counts_as_written_where_each_answer_becomes_a_row():
    # As Qwen3: the reasoning of earlier answers is left out.
    template = TOOLS.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    data = read([{"messages": [*ask("b", reasoning_content="why"), *ask("c")]}], template)
    assert "[<think>why</think>b<|im_end|>]" in shown(data, template)[0]
    assert len(data.train) == 2
    assert data.unused == {}


def test_a_reasoning_under_two_names_is_written_once_and_not_named():
    rows = [{"messages": ask("4", reasoning="x", reasoning_content="x")}]
    assert len(read(rows, TOOLS).unused) == 1
    assert "messages[].reasoning_content" not in read(rows, TOOLS).unused


def test_a_function_call_is_trained_as_text_where_the_template_knows_no_calls():
    turns = [
        turn("human", "a"),
        turn("function_call", '{"name": "f"}'),
        turn("observation", "7"),
        turn("gpt", "it is 7"),
    ]
    data = read([{"conversations": [{"from": one["role"], "value": one["content"]} for one in turns]}])
    assert shown(data)[0].endswith(
        'assistant\n[{"name": "f"}<|im_end|>]\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n[it is 7<|im_end|>]\n'
    )
    assert any("function calls are trained as text" in notice for notice in data.notices)


ROLES = {
    "user": ["human", "User", "prompter"],
    "assistant": ["gpt", "GPT", "model"],
    "tool": ["function", "observation", "ipython"],
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in ROLES.items() for name in names])
def test_the_roles_of_other_tools_are_known(role, name):
    def talk(names):
        return [
            turn(names.get(one["role"], one["role"]), one["content"])
            for one in [*ask("c"), turn("tool", "7"), *ask()[1:]]
        ]

    assert fingerprint(read([{"messages": talk({role: name})}]).train) == fingerprint(
        read([{"messages": talk({})}]).train
    )


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_turns_that_are_json_text_are_turns(key):
    expected = fingerprint(read([{"messages": ask()}]).train)
    assert fingerprint(read([{key: json.dumps(ask())}]).train) == expected
    prompt, completion = json.dumps(ask()[:1]), json.dumps(ask()[1:])
    assert fingerprint(read([{"prompt": prompt, "completion": completion}]).train) == expected
    assert shown(read([{"prompt": "[1, 2]", "completion": "[3]"}])) == ["[1, 2][[3]<|im_end|>]"]


@pytest.mark.slow
def test_several_processes_give_the_same_rows_and_account(tmp_path, write_rows):
    rows = [{**row, "score": n, "system": "S."} for n, row in enumerate(chat_rows(6))]
    sources = load_sources(str(write_rows(rows)))
    one, two = (tokenize_rows(*sources, make_tokenizer(), num_proc=count) for count in (None, 2))
    assert fingerprint(one.train) == fingerprint(two.train)
    assert one.unused == two.unused == {"score": 6}
