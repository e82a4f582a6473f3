"""Cells are trained as their file has them, and a path is a path."""

import json

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from qriemann.data.row_files import _READERS
from qriemann.data.sources import Source, load_sources
from qriemann.errors import InputError
from qriemann.folder.files import ROW_FILES
from tests.recipe_fixtures import chat_rows


def rows_of(path, **options):
    return [dict(row) for row in load_sources(str(path), **options)[0]]


def test_every_ending_that_is_accepted_has_a_reader():
    assert sorted(_READERS) == sorted(ROW_FILES)


CELLS = [
    "007",
    "1e6",
    "1.50",
    "3",
    "NA",
    "null",
    "None",
    "nan",
    "True",
    "-0",
    "2024-01-02",
    " padded ",
    "1_000",
    "",
    "a,b",
    "ä",
]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
def test_a_text_cell_is_read_as_it_was_written(ending, tmp_path):
    path = tmp_path / f"rows.{ending}"
    rows = [{"instruction": cell, "output": "x"} for cell in CELLS]
    if ending == "csv":
        path.write_text("instruction,output\n" + "".join(f'"{cell}",x\n' for cell in CELLS), encoding="utf-8-sig")
    elif ending == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert [row["instruction"] for row in rows_of(path)] == CELLS


def test_a_long_cell_with_line_ends_and_quotation_marks_is_one_cell(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text\n"' + "x" * 200_000 + '\n""quoted"""\n')
    assert rows_of(path) == [{"text": "x" * 200_000 + '\n"quoted"'}]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a,b\n1,2,3\n", "line 2: 3 cells for 2 columns"),
        ('a,b\n1,"2\n3,4\n', "a quotation mark is never closed"),
        ("a,a\n1,2\n", "columns twice"),
        ("a,b\n", "at least one row"),
        ("a,b\n\udcff,2\n", "not UTF-8"),
    ],
)
def test_a_broken_csv_file_is_named_by_its_cause(content, line, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=line):
        rows_of(path)


OBJECTS = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "alpaca beside a list of objects": {"instruction": "a", "output": "b", "sources": [{"text": "unrelated"}]},
    "prompt and completion": {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant"}]},
    "turns under a name of their own": {"dialog": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "a text beside a list of objects": {"text": "a", "chapters": [{"text": "b"}, {"text": "c"}]},
    "several lines": {"text": "a\nb", "n": None},
}


@pytest.mark.parametrize("row", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_json_object_is_one_row(row, indent, tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(row, indent=indent))
    assert rows_of(path) == [row]


def test_lines_of_json_end_at_a_line_feed_and_nowhere_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"one{mark}two"} for mark in "\u2028\u2029\x85\x0b\x0c\x1c"] + [{"text": "end"}]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8-sig", newline=""
    )
    assert rows_of(path) == rows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply|column"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_that_no_tokenizer_could_take_is_named(line, reason, ending, tmp_path):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n" if ending == "jsonl" else b"[" + line + b"]")
    with pytest.raises(InputError, match=reason) as caught:
        rows_of(path)
    assert "line 2" in str(caught.value) or ending == "json"


NAMES = ["only[2].jsonl", "a?.jsonl", "a*.jsonl", "{a,b}.jsonl", "a b%20#.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_is_no_pattern(name, write_rows):
    for other in ("only2.jsonl", "ab.jsonl", "a.jsonl", "b.jsonl"):
        write_rows([{"text": "wrong"}], other)
    assert rows_of(write_rows([{"text": "right"}], name)) == [{"text": "right"}]


@pytest.mark.parametrize(("folder", "ending"), [("data[v2]", "jsonl"), ("data?", "parquet"), ("[1]/x*", "jsonl")])
def test_the_name_of_a_folder_is_no_pattern(folder, ending, tmp_path, write_rows):
    for place, text in (("datav", "wrong"), ("data2", "wrong"), ("1/xy", "wrong"), (folder, "right")):
        (tmp_path / place).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"text": f"{text} {split}"}]
            path = write_rows(rows, f"{place}/{split}.jsonl")
            if ending == "parquet":
                path.unlink()
                Dataset.from_list(rows).to_parquet(path.with_suffix(".parquet"))
    train, held_out = load_sources(str(tmp_path / folder))
    assert [row["text"] for source in (train, held_out) for row in source] == ["right train", "right test"]


def test_the_cells_of_files_in_a_folder_stay_as_they_are_too(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_text("text\n007\n")
    (tmp_path / "rows" / "b.csv").write_text("text,note\nNA,1e6\n")
    assert rows_of(tmp_path / "rows") == [{"text": "007"}, {"text": "NA", "note": "1e6"}]


def test_a_folder_that_says_how_its_files_are_to_be_read_is_obeyed(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_text("text;note\na,b;c\n")
    (tmp_path / "rows" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: ;\n---\n"
    )
    assert rows_of(tmp_path / "rows") == [{"text": "a,b", "note": "c"}]


def test_a_folder_with_several_configurations_gives_the_one_that_is_named(tmp_path, write_rows):
    (tmp_path / "rows").mkdir()
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("a", "b"))
    (tmp_path / "rows" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("a", "b"):
        write_rows([{"text": name}], f"rows/{name}.jsonl")
    assert rows_of(tmp_path / "rows", config="b") == [{"text": "b"}]


def test_local_files_need_no_cache_and_a_cache_that_cannot_be_written_is_named(tmp_path, write_rows, monkeypatch):
    place = "/dev/null/x"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place)
    assert len(rows_of(write_rows(chat_rows(2)))) == 2
    (tmp_path / "rows").mkdir()
    write_rows(chat_rows(2), "rows/train.jsonl")
    assert len(rows_of(tmp_path / "rows")) == 2
    with pytest.raises(InputError, match=f"{place} cannot be written .*HF_DATASETS_CACHE, or HF_HOME"):
        load_sources("someone/on-the-hub")


ARGUMENTS = [{"city": "Oslo"}, {"a": 2, "b": {"c": [1]}}, {}, {"city": "Rome", "days": [{"n": 1}, {"m": 2}]}]


def called(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "dataset"])
def test_what_arrow_fills_in_is_taken_out_again(kind, tmp_path):
    rows = [{"messages": called(arguments)} for arguments in ARGUMENTS if arguments]
    typed = Dataset(pa.Table.from_pylist(rows))
    # Arrow has given every object the keys of all.
    assert typed[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["a"] is None
    if kind == "dataset":
        source = Source(typed, "rows")
    elif kind == "arrow":
        typed.save_to_disk(str(tmp_path / "saved"))
        source = load_sources(str(tmp_path / "saved"))[0]
    else:
        typed.to_parquet(tmp_path / "rows.parquet")
        source = load_sources(str(tmp_path / "rows.parquet"))[0]
    assert [dict(row) for row in source] == rows


def test_a_null_that_a_json_file_holds_stays(write_rows):
    rows = [{"messages": called(arguments)} for arguments in [{"a": None}, *ARGUMENTS]]
    assert rows_of(write_rows(rows)) == rows
