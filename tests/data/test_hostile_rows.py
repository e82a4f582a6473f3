"""Rows from strangers: whatever is in a file, what comes out is the rows that were meant or one line."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from qriemann.data.formats import prepare
from qriemann.data.sources import load_sources
from qriemann.errors import InputError
from tests.fuzz import SPECIAL, at_length, damage, damages, hostile_input, make_special, values

pytestmark = [
    # `datasets` leaves a CSV file open that pandas cannot read.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]

turns = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), values, max_size=3)
rows = st.dictionaries(
    st.sampled_from(["messages", "prompt", "completion", "text", "instruction", "output", "conversations", "other"]),
    st.lists(turns | values, max_size=3) | values,
    max_size=3,
)


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_not_a_file_is_not_rows(tmp_path, kind):
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / name
        make_special(path, kind)
        # The folder as a dataset, then the file.
        for place in (path.parent, path):
            with hostile_input(tmp_path), pytest.raises(InputError) as caught:
                load_sources(str(place))
            assert "\n" not in str(caught.value)


def as_csv(content) -> bytes:
    text = io.StringIO()
    names = sorted({name for row in content for name in row})
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    # A text cell stays as it is; anything else is the JSON that people put into cells.
    writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in content)
    return text.getvalue().encode(errors="surrogatepass")


def as_parquet(content) -> bytes:
    sink = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(content), sink)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        # Parquet has no place for these rows.
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": [json.dumps(row) for row in content]}), sink)
    return sink.getvalue()


WRITERS = {
    ".jsonl": lambda content: "".join(json.dumps(row) + "\n" for row in content).encode(),
    ".json": lambda content: json.dumps(content if len(content) != 2 else {"data": content}).encode(),
    ".csv": as_csv,
    ".parquet": as_parquet,
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where `datasets` keeps what it has read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read_dataset(tmp_path, cache, tokenizer, content, suffix, broken):
    path = tmp_path / f"rows{suffix}"
    written = content if isinstance(content, bytes) else WRITERS[suffix](content)
    path.write_bytes(written if broken is None else damage(written, *broken[:2], cut=broken[2]))
    try:
        with hostile_input(tmp_path):
            train, held_out = load_sources(str(path))
            prepare(train, held_out, tokenizer, max_length=64)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


dataset_contents = {
    "content": st.lists(rows, max_size=3) | st.binary(max_size=100),
    "suffix": st.sampled_from(sorted(WRITERS)),
    "broken": st.none() | damages,
}
test_any_dataset_file_is_rows_or_one_line, test_10_000_dataset_files = at_length(read_dataset, dataset_contents)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "[" * 100_000, "[" * 100_000 + "]" * 100_000], ids=["digits", "open", "deep"]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_what_python_cannot_read_of_json_is_one_line(tmp_path, name, value):
    text = f'{{"text": "a", "more": {value}}}'
    (tmp_path / name).write_text(text if name == "rows.jsonl" else f"[{text}]")
    with pytest.raises(InputError, match="JSON") as caught:
        load_sources(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "outside",
    [
        "data_files: ../secret.jsonl",
        "data_files: [{{split: train, path: ../s*.jsonl}}]",
        "data_files: {}/secret.jsonl",
        "data_files: file://{}/secret.jsonl",
        "data_dir: ..",
    ],
)
@pytest.mark.parametrize("readme", ["README.md", ".huggingface.yaml"])
def test_the_readme_of_a_folder_names_no_rows_outside_of_it(tmp_path, cache, outside, readme):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "public"}\n')
    mark = "---\n" if readme == "README.md" else ""
    (folder / readme).write_text(f"{mark}configs:\n- config_name: a\n  {outside.format(tmp_path)}\n{mark}")
    with pytest.raises(InputError, match="must name files in it"):
        load_sources(str(folder))
    (folder / readme).write_text(f"{mark}configs:\n- config_name: a\n  data_files: rows.jsonl\n{mark}")
    assert load_sources(str(folder))[0].rows["text"] == ["public"]


@pytest.mark.parametrize("record", ["state.json", "dataset_dict.json"])
def test_the_records_of_a_saved_dataset_name_no_rows_outside_of_it(tmp_path, record):
    rows = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("secret", "public")}
    for name in rows:
        datasets.DatasetDict(train=rows[name]).save_to_disk(str(tmp_path / name))
    folder = tmp_path / "public"
    assert load_sources(str(folder))[0].rows["text"] == ["public"]
    assert load_sources(str(folder / "train"))[0].rows["text"] == ["public"]
    path = folder / record if record == "dataset_dict.json" else folder / "train" / record
    for outside in ("../secret/train", str(tmp_path / "secret" / "train")):
        content = json.loads(path.read_text())
        if record == "state.json":
            content["_data_files"] = [
                {"filename": f"{'../' * outside.startswith('.')}{outside}/data-00000-of-00001.arrow"}
            ]
        else:
            content["splits"] = [outside]
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match="must name files in it"):
            load_sources(str(folder))


def test_bytes_of_a_parquet_file_that_are_no_text_are_one_line(tmp_path, cache):
    buffers = [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\x80")]
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, buffers)}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="Invalid UTF8") as caught:
        load_sources(str(tmp_path / "rows.parquet"))
    assert "\n" not in str(caught.value)
