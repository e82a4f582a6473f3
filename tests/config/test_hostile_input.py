"""Files from strangers and from crashes: whatever is in them, what comes out is the run that was meant or one line."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import strategies as st

from qriemann.checkpoints.manifest import MANIFEST, find_content_defect, find_defect, newest_checkpoint
from qriemann.config.settings import _FIELDS, load_settings
from qriemann.data.formats import prepare
from qriemann.data.sources import load_sources
from qriemann.errors import InputError
from tests.fuzz import SPECIAL, at_length, damage, damages, hostile_input, make_special, scalars, values
from tests.runs import protected_trainer

pytestmark = [
    # Upstream's own line about a key that it will drop: it names the key.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    # `datasets` leaves a CSV file open that pandas cannot read.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]

keys = st.sampled_from(sorted(_FIELDS)) | st.text(max_size=12)
turns = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), values, max_size=3)
rows = st.dictionaries(
    st.sampled_from(["messages", "prompt", "completion", "text", "instruction", "output", "conversations", "other"]),
    st.lists(turns | values, max_size=3) | values,
    max_size=3,
)


def read_yaml_settings(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    environment = dict(os.environ)
    try:
        with hostile_input(tmp_path):
            load_settings(path)
    finally:
        os.environ.clear()
        os.environ.update(environment)


# YAML as people write it and no writer of it does: tags, anchors, aliases, merges, dates, keys given twice. Each part is
# most often whole, so that it is refused for what it means and not for how it is spelled.
tags = st.sampled_from(
    ["", "", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!map "]
)
numbers = [
    "1",
    "1e-4",
    ".inf",
    "-.nan",
    "1:60:60",
    "0x_",
    "9" * 5000,
    "0x" + "f" * 5000,
    "2024-13-45",
    "2024-02-30T25:00:00Z",
]
words = st.sampled_from(["a", "~", "yes", "=", '"\\UFFFFFFFF"', '"\\ud800"', '"\\0"', "*a", "*b", "&b", *numbers])
broken = st.text(max_size=8) | st.sampled_from(["!<> ", "!x ", "|", "@", "%YAML 9.9", "---", "\t", "#", "\ufeff", "'"])
anchors = st.sampled_from(["", "", "", "&a ", "&b "])
yaml_nodes = st.recursive(
    st.builds("{}{}".format, tags, words),
    lambda inner: (
        st.builds("{}[{}]".format, anchors, st.lists(inner, max_size=3).map(", ".join))
        | st.builds(
            "{}{{{}: {}, {}: {}}}".format, anchors, st.sampled_from(["<<", "x"]), inner, st.just("x") | inner, inner
        )
    ),
    max_leaves=4,
)
names = st.sampled_from([*sorted(_FIELDS), *["env", "<<", "seed", "run_name"] * 5])
yaml_lines = st.lists(st.builds("{}: {}\n".format, names, yaml_nodes), min_size=1, max_size=3).map("".join)
yaml_contents = (
    st.binary(max_size=200)
    | yaml_lines.map(lambda lines: f"output_dir: out\n{lines}".encode())
    | st.builds(lambda lines, end: f"output_dir: out\n{lines}{end}".encode(errors="surrogatepass"), yaml_lines, broken)
    | st.dictionaries(keys, values, max_size=4).map(lambda content: {"output_dir": "out", **content})
)
test_any_yaml_is_a_configuration_or_one_line, test_10_000_yamls = at_length(
    read_yaml_settings, {"content": yaml_contents}
)


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_neither_a_configuration_nor_rows(tmp_path, kind):
    for name in ("run.yaml", "rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / name
        make_special(path, kind)
        # The folder as a dataset, then the file.
        for read in (load_settings, load_sources) if name == "run.yaml" else (load_sources,):
            for place in (path.parent, path):
                with hostile_input(tmp_path), pytest.raises(InputError) as caught:
                    read(str(place))
                assert "\n" not in str(caught.value)


def test_a_yaml_cannot_construct_objects(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(InputError, match="valid YAML"):
        load_settings(path)
    assert not (tmp_path / "made").exists()


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer, _ = protected_trainer(folder, max_steps=1)
    trainer.train()
    return folder / "checkpoint-1"


def read_damaged_checkpoint(tmp_path, checkpoint, name, broken):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    damaged = Path(shutil.copytree(checkpoint, run / checkpoint.name))
    path = damaged / name
    content = path.read_bytes()
    path.write_bytes(damage(content, *broken[:2], cut=broken[2]))
    intact = path.read_bytes() == content
    with hostile_input(run):
        found = newest_checkpoint(run)
        # A manifest of the same meaning may be other bytes: spaces, say.
        assert (found.path is not None) == intact or name == MANIFEST
        # What a stranger's manifest would vouch for.
        assert "\n" not in (find_content_defect(damaged) or "")


damaged_checkpoints = {
    "name": st.sampled_from(
        ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST]
    ),
    "broken": damages,
}
test_any_damage_to_a_checkpoint_is_found, test_10_000_damaged_checkpoints = at_length(
    read_damaged_checkpoint, damaged_checkpoints
)


def read_manifest_of_anyone(tmp_path, content):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    (tmp_path / "outside").write_text("")
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "checkpoint-1" / MANIFEST).write_text(json.dumps(content))
    with hostile_input(run):
        assert find_defect(run / "checkpoint-1") is not None
        assert newest_checkpoint(run).path is None


manifests = st.fixed_dictionaries(
    {
        "format": st.just(1) | scalars,
        "serial": st.just(1) | values,
        "run": st.just({}) | values,
        "files": st.dictionaries(
            st.sampled_from(["../outside", "/etc/passwd", "optimizer.pt", "\x00", "a" * 300, "."])
            | st.text(max_size=9),
            st.fixed_dictionaries({"bytes": st.just(0) | values, "sha256": values}) | values,
            max_size=3,
        )
        | values,
    }
)
test_no_manifest_of_anyone_makes_a_checkpoint, test_10_000_manifests = at_length(
    read_manifest_of_anyone, {"content": manifests}
)


def read_state_of_anyone(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(json.dumps(content))
    with hostile_input(tmp_path):
        defect = find_content_defect(tmp_path)
        assert "\n" not in (defect or "")
        assert defect is None or "trainer_state.json" in defect


states = st.dictionaries(
    st.sampled_from(["global_step", "epoch", "max_steps", "log_history", "stateful_callbacks", "best_metric"])
    | st.text(max_size=8),
    values,
    max_size=4,
)
test_any_trainer_state_is_read_or_refused, test_10_000_trainer_states = at_length(
    read_state_of_anyone, {"content": states | values}
)
