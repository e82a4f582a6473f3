"""Finds the splits of a local file, a folder or a Hub dataset, and gives their rows as plain objects."""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features, List, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from qriemann.data.row_files import JSON_COLUMN, read_files
from qriemann.data.turns import Row
from qriemann.errors import InputError, first_line
from qriemann.folder.files import ROW_FILES
from qriemann.upstream import literal_folders

_HELD_OUT_SPLITS = ("test", "validation", "eval")

Batch = dict[str, list[Any]]


@dataclass(frozen=True)
class Source:
    """One split.

    Attributes:
        rows: a dataset with columns, or one whose only column, `row_files.JSON_COLUMN`, holds each row as a JSON object.
        keys: the columns of rows that are JSON objects.
    """

    rows: Dataset
    name: str
    keys: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], name: str) -> "Source":
        """Rows in memory; each keeps the keys that it has."""
        kept = list(rows)
        keys = dict.fromkeys(key for row in kept for key in row)
        return cls(Dataset.from_dict({JSON_COLUMN: [json.dumps(row, default=str) for row in kept]}), name, tuple(keys))

    @property
    def holds_json(self) -> bool:
        """Whether the rows are JSON objects."""
        return self.rows.column_names == [JSON_COLUMN]

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return [*_renamed(dict.fromkeys(self.keys if self.holds_json else self.rows.column_names), self.renamed)]

    @property
    def read(self) -> Callable[[Batch], list[Row]]:
        """Makes rows of a batch of the dataset."""
        make = _from_json if self.holds_json else functools.partial(_from_columns, features=self.rows.features)
        return functools.partial(_read, make=make, renamed=self.renamed)

    def first(self, count: int | None) -> "Source":
        """The first rows; all of them without a count."""
        if count is None or count >= len(self.rows):
            return self
        return dataclasses.replace(self, rows=self.rows.select(range(count)))

    def __iter__(self) -> Iterator[Row]:
        for batch in self.rows.iter(1000):
            yield from self.read(batch)


def _read(batch: Batch, make: Callable[[Batch], list[dict[str, Any]]], renamed: Mapping[str, str]) -> list[Row]:
    return [Row(_renamed(row, renamed) if renamed else row) for row in make(batch)]


def _from_json(batch: Batch) -> list[dict[str, Any]]:
    return [json.loads(text) for text in batch[JSON_COLUMN]]


def _from_columns(batch: Batch, features: Features) -> list[dict[str, Any]]:
    """Rows without what Arrow adds: every object of a column has the keys of all, those that it lacked with null."""
    count = len(next(iter(batch.values())))
    return [{key: _as_written(batch[key][i], features[key]) for key in batch} for i in range(count)]


def _as_written(value: Any, feature: Any) -> Any:
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _as_written(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(feature, List | datasets.LargeList) and isinstance(value, list):
        return [_as_written(item, feature.feature) for item in value]
    return value


def _renamed(row: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The row under its columns' new names; a column that has such a name already is replaced."""
    replaced = {new for old, new in renamed.items() if old in row}
    return {renamed.get(key, key): value for key, value in row.items() if key in renamed or key not in replaced}


def load_sources(
    name: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    eval_name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[Source, Source | None]:
    """The training rows, and the held-out rows if this dataset or a second one has them.

    Args:
        config: the configuration of a Hub dataset, or of a folder that is a copy of one.
        test_split: the split to hold out; None takes test, validation or eval if one exists.
        eval_name: a second dataset or file to hold out, instead of a split.

    Raises:
        InputError: the dataset does not exist, cannot be reached or read, or lacks the split, or the split is empty.
    """
    splits = _load(name, config)
    train = _pick(splits, train_split, name, "dataset_train_split", columns)
    if eval_name is not None:
        held_out_splits = _load(eval_name, config)
        # A file is one split called train, although these rows are held out.
        fallback = test_split or next((split for split in _HELD_OUT_SPLITS if split in held_out_splits), "train")
        return train, _pick(held_out_splits, fallback, eval_name, "dataset_test_split", columns)
    wanted = test_split or next((split for split in _HELD_OUT_SPLITS if split in splits), None)
    if wanted is None or wanted == train_split:
        return train, None
    return train, _pick(splits, wanted, name, "dataset_test_split", columns)


def _pick(splits: Mapping[str, Source], split: str, name: str, key: str, columns: Mapping[str, str] | None) -> Source:
    if split not in splits:
        raise InputError(f"{key} must be a split of {name}, got {split!r}; its splits are {', '.join(splits)}")
    source = splits[split]
    if len(source.rows) == 0:
        raise InputError(f"split {split!r} of {name} must hold at least one row, got an empty split; check the dataset")
    for old in columns or {}:
        if old not in source.columns:
            raise InputError(f"dataset_columns must be among {name}'s {', '.join(source.columns)}, got {old!r}")
    return dataclasses.replace(source, name=f"{name} ({split})", renamed=columns or {})


def _load(name: str, config: str | None) -> dict[str, Source]:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in ROW_FILES:
            raise InputError(
                f"a dataset file must end in {', '.join(ROW_FILES)}, got {path}; convert it to one of them"
            )
        return {"train": _from_files([path])}
    if path.is_dir():
        return _read_folder(path, config)
    if path.suffix.lower() in ROW_FILES or name.startswith((".", "/", "~")):
        raise InputError(f"dataset_name: {name}: no such file or folder")
    return _as_sources(_load_from_hub(name, config))


def _from_files(paths: Iterable[Path]) -> Source:
    rows, keys = read_files(paths)
    return Source(rows, "", tuple(keys))


def _as_sources(loaded: Dataset | DatasetDict) -> dict[str, Source]:
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    return {name: Source(rows, "") for name, rows in splits.items()}


def _read_folder(path: Path, name: str | None) -> dict[str, Source]:
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _as_sources(load_from_disk(str(path)))
        # The builder finds the files of each split, and those that the folder's README names, without reading a row.
        with literal_folders(), tempfile.TemporaryDirectory() as cache:
            config = load_dataset_builder(str(path), name, cache_dir=cache).config
        files = {split: [Path(file) for file in found] for split, found in (config.data_files or {}).items()}
        if _is_plain(config) and all(file.suffix.lower() in ROW_FILES for names in files.values() for file in names):
            return {split: _from_files(names) for split, names in files.items()}
        _check_cache()
        with literal_folders():
            return _as_sources(load_dataset(str(path), name))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"dataset_name: datasets cannot load the folder {path}: {first_line(error)}") from error


def _is_plain(config: Any) -> bool:
    """Whether a folder's README says nothing of how its files are to be read, such as the separator of a CSV file."""
    usual, found = (vars(entry) for entry in (type(config)(), config))
    named = ("name", "version", "data_dir", "data_files", "description", "features")
    return all(found[key] == value for key, value in usual.items() if key not in named)


def _load_from_hub(name: str, config: str | None) -> DatasetDict:
    try:
        _check_cache()
        return load_dataset(name, name=config)
    except InputError:
        raise
    except DatasetNotFoundError as error:
        raise InputError(
            f"dataset_name: {name}: no such local file or dataset on the Hub; if it is private, `hf auth login` first"
        ) from error
    # A DNS failure, an HTTP error or a refused loading script: all of them are about the name or the connection.
    except Exception as error:
        remedy = "set dataset_config" if "config" in str(error).lower() else "check the name and the connection"
        raise InputError(
            f"dataset_name: {name} cannot be reached or read: {first_line(error.__cause__ or error)}; {remedy}"
        ) from error


def _check_cache() -> None:
    """Raises InputError where `datasets` cannot write its cache."""
    folder = datasets.config.HF_DATASETS_CACHE
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); set HF_DATASETS_CACHE, or HF_HOME, to a folder that can"
        ) from error
