"""A downloaded dataset folder names no rows outside itself."""

import json

import datasets
import pytest

from qriemann.data.sources import load_sources
from qriemann.errors import InputError


def texts(folder):
    return [row["text"] for row in load_sources(str(folder))[0]]


@pytest.mark.parametrize(
    "outside",
    [
        "data_files: ../secret.jsonl",
        "data_files: [{{split: train, path: ../s*.jsonl}}]",
        "data_files: file://{}/secret.jsonl",
        "data_dir: ..",
    ],
)
def test_the_readme_of_a_folder_names_no_rows_outside_of_it(tmp_path, monkeypatch, outside):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "public"}\n')
    readme = folder / "README.md"
    readme.write_text(f"---\nconfigs:\n- config_name: a\n  {outside.format(tmp_path)}\n---\n")
    with pytest.raises(InputError, match="must name files in it"):
        load_sources(str(folder))
    readme.write_text("---\nconfigs:\n- config_name: a\n  data_files: rows.jsonl\n---\n")
    assert texts(folder) == ["public"]


@pytest.mark.parametrize("record", ["state.json", "dataset_dict.json"])
def test_the_records_of_a_saved_dataset_name_no_rows_outside_of_it(tmp_path, record):
    rows = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("secret", "public")}
    for name in rows:
        datasets.DatasetDict(train=rows[name]).save_to_disk(str(tmp_path / name))
    folder = tmp_path / "public"
    assert texts(folder) == ["public"]
    assert texts(folder / "train") == ["public"]
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
