"""Files and row formats: what is accepted gives the same tokens whatever it was written as; what is not is named."""

import csv
import json

import pytest
from datasets import Dataset

from qriemann.data.sources import load_sources
from qriemann.data.tokenized import fingerprint, tokenize_rows
from qriemann.errors import InputError
from tests.recipe_fixtures import chat_rows, make_tokenizer

ROWS = [("say 1", "it is 1"), ("say 2", "it is 2")]


def tokens_of(path, tokenizer, **options):
    return tokenize_rows(*load_sources(str(path)), tokenizer, **options)


def turn(role, content):
    return {"role": role, "content": content}


def as_formats():
    return {
        "messages": [{"messages": [turn("user", q), turn("assistant", a)]} for q, a in ROWS],
        "sharegpt": [
            {"id": 3, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in ROWS
        ],
        "prompt and completion": [{"prompt": [turn("user", q)], "completion": [turn("assistant", a)]} for q, a in ROWS],
        "alpaca": [{"instruction": q, "input": "", "output": a, "text": "rendered"} for q, a in ROWS],
    }


@pytest.mark.parametrize("name", sorted(as_formats().keys() - {"messages"}))
def test_every_conversational_format_gives_the_tokens_of_messages(name, write_rows, tokenizer):
    formats = as_formats()
    expected = tokens_of(write_rows(formats["messages"], "messages.jsonl"), tokenizer)
    got = tokens_of(write_rows(formats[name]), tokenizer)
    assert got.train["input_ids"][:] == expected.train["input_ids"][:]
    assert got.train["labels"][:] == expected.train["labels"][:]


def test_json_csv_and_parquet_hold_the_same_rows_as_json_lines(tmp_path, write_rows, tokenizer):
    rows = as_formats()["alpaca"]
    prints = {fingerprint(tokens_of(write_rows(rows), tokenizer).train)}
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("list.json", "wrapped.json", "lines.json", "rows.parquet", "rows.csv"):
        prints.add(fingerprint(tokens_of(tmp_path / name, tokenizer).train))
    assert len(prints) == 1


def test_the_fingerprint_sees_a_label_and_a_row_boundary():
    rows = {"input_ids": [[1, 2], [3]], "labels": [[-100, 2], [3]]}
    moved = {"input_ids": [[1], [2, 3]], "labels": [[-100], [2, 3]]}
    masked = {"input_ids": [[1, 2], [3]], "labels": [[-100, -100], [3]]}
    assert len({fingerprint(Dataset.from_dict(columns)) for columns in (rows, moved, masked)}) == 3


def test_held_out_rows_are_not_trained_on_and_are_announced(write_rows, tokenizer):
    data = tokens_of(write_rows(chat_rows(20)), tokenizer, eval_size=0.25, seed=3)
    trained, held_out = (set(map(tuple, part["input_ids"])) for part in (data.train, data.held_out))
    assert (len(trained), len(held_out)) == (15, 5)
    assert not trained & held_out
    assert any("5 of 20 rows" in notice for notice in data.notices)


def test_rows_that_truncation_leaves_bare_are_left_out_with_a_notice(write_rows, tokenizer):
    rows = chat_rows(2)
    rows[1]["messages"][0]["content"] = "x" * 500
    data = tokens_of(write_rows(rows), tokenizer, max_length=200)
    assert len(data.train) == 1
    assert any("row 2" in notice and "max_length 200" in notice for notice in data.notices)


def test_texts_without_roles_are_trained_whole_and_say_so(write_rows, tokenizer):
    data = tokens_of(write_rows([{"text": "abc"}]), tokenizer)
    assert tokenizer.decode(data.train[0]["labels"]) == "abc<|im_end|>"
    assert any("every token" in notice for notice in data.notices)


def test_conversations_need_a_chat_template(write_rows):
    with pytest.raises(InputError, match="chat_template_path"):
        tokens_of(write_rows(chat_rows(1)), make_tokenizer(None))


def bad_rows():
    empty_turn = chat_rows(3)
    empty_turn[2]["messages"][1]["content"] = "  "
    no_assistant = chat_rows(2)
    no_assistant[0]["messages"].pop()
    odd_role = chat_rows(1)
    odd_role[0]["messages"][1]["role"] = "narrator"
    return {
        "no usable columns": ([{"question": "a", "answer": "b"}], ["answer, question", "messages", "Alpaca"]),
        "an empty assistant turn": (empty_turn, ["row 3 of", "has an empty assistant turn; fill it"]),
        "an empty output": ([{"instruction": "a", "output": ""}], ["empty output", "row 1"]),
        "a fully masked row": (no_assistant, ["every token is masked", "row 1"]),
        "an unknown role": (odd_role, ["'narrator'", "row 1"]),
        "a mapping for a text": ([{"text": "a"}, {"text": {"b": 1}}], ["string in text", "row 2"]),
    }


@pytest.mark.parametrize(("rows", "parts"), bad_rows().values(), ids=bad_rows().keys())
def test_rows_that_cannot_be_trained_on_are_named(rows, parts, write_rows, tokenizer):
    with pytest.raises(InputError) as caught:
        tokens_of(write_rows(rows), tokenizer)
    for part in parts:
        assert part in str(caught.value)


def test_broken_json_lines_are_named_by_the_first_three_line_numbers(tmp_path):
    good = json.dumps(chat_rows(1)[0])
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good, "{", good, "[1]", "", "nope", "{'a': 1}", good]) + "\n")
    with pytest.raises(InputError, match=r"line 2 .*, line 4 .*, line 6 .* and 1 more"):
        load_sources(str(path))


def test_a_missing_file_an_odd_suffix_and_an_unknown_split_are_named(tmp_path, write_rows):
    with pytest.raises(InputError, match="no such file"):
        load_sources(str(tmp_path / "none.jsonl"))
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(InputError, match=r"\.jsonl, \.json, \.csv, \.parquet"):
        load_sources(str(tmp_path / "rows.xlsx"))
    with pytest.raises(InputError, match="'dev'; its splits are train"):
        load_sources(str(write_rows(chat_rows(1))), test_split="dev")


def test_columns_can_be_renamed_to_what_is_recognized(write_rows, tokenizer):
    path = write_rows([{"question": q, "solution": a, "output": "?"} for q, a in ROWS])
    renamed = tokenize_rows(
        *load_sources(str(path), columns={"question": "instruction", "solution": "output"}), tokenizer
    )
    expected = tokens_of(write_rows(as_formats()["alpaca"], "alpaca.jsonl"), tokenizer)
    assert renamed.train["input_ids"][:] == expected.train["input_ids"][:]
    with pytest.raises(InputError, match="question, solution, output, got 'answer'"):
        load_sources(str(path), columns={"answer": "output"})
