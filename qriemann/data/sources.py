"""Finds and reads the splits of a local file, a folder or a Hub dataset.

`datasets` does the reading; this adds errors that a user can act on: which line of a file is broken, which splits exist,
whether the Hub was reached.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from qriemann.errors import InputError

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_HELD_OUT_SPLITS = ("test", "validation", "eval")
_SHOWN_ERRORS = 3


@dataclass
class Source:
    """One split, with its name for messages."""

    rows: Dataset
    name: str


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
        name: a Hub id, a local file or a local folder.
        config: the configuration of a Hub dataset.
        train_split: the split to train on; a file is one split, called train.
        test_split: the split to hold out; None takes test, validation or eval if one exists.
        eval_name: a second dataset or file to hold out, instead of a split.
        columns: maps columns to their new names.

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


def _pick(splits: DatasetDict, split: str, name: str, key: str, columns: Mapping[str, str] | None) -> Source:
    if split not in splits:
        raise InputError(f"{key} must be a split of {name}, got {split!r}; its splits are {', '.join(splits)}")
    rows = splits[split]
    if len(rows) == 0:
        raise InputError(f"split {split!r} of {name} must hold at least one row, got an empty split; check the dataset")
    for old, new in (columns or {}).items():
        if old not in rows.column_names:
            raise InputError(
                f"dataset_columns must name columns of {name}, got {old!r}; its columns are {', '.join(rows.column_names)}"
            )
        # Drop an existing column of that name: the renamed one replaces it.
        rows = rows.remove_columns(new) if new in rows.column_names else rows
        rows = rows.rename_column(old, new)
    return Source(rows, f"{name} ({split})")


def _load(name: str, config: str | None) -> DatasetDict:
    path = Path(name).expanduser()
    if path.is_file():
        return DatasetDict(train=_read_file(path))
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() in _BUILDERS or name.startswith((".", "/", "~")):
        raise InputError(f"dataset_name: {name}: no such file or folder")
    return _load_from_hub(name, config)


def _read_folder(path: Path) -> DatasetDict:
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            _refuse_outside(path, _saved_files(path))
            loaded = load_from_disk(str(path))
        else:
            # The builder resolves the files that the folder's README names, without reading a row.
            named = (load_dataset_builder(str(path)).config.data_files or {}).values()
            _refuse_outside(path.resolve(), (Path(file) for files in named for file in files))
            loaded = load_dataset(str(path))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"dataset_name: datasets cannot load the folder {path}: {_first_line(error)}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def _saved_files(folder: Path) -> Iterator[Path]:
    """The files that `load_from_disk` opens, as the folder's own records name them."""
    parts, splits = [folder], folder / "dataset_dict.json"
    if splits.is_file():
        parts += [folder / name for name in json.loads(splits.read_text(encoding="utf-8"))["splits"]]
    for part in parts:
        yield part
        if (part / "state.json").is_file():
            state = json.loads((part / "state.json").read_text(encoding="utf-8"))
            yield from (part / file["filename"] for file in state["_data_files"])


def _refuse_outside(folder: Path, files: Iterable[Path]) -> None:
    """Raises InputError if a folder names rows outside itself; symbolic links, as in the Hub's cache, may point outside."""
    for file in files:
        inside = Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder))
        if not inside:
            raise InputError(
                f"a dataset's folder must name files in it, got {str(file)!r:.200} in {folder}; copy it there"
            )


def _load_from_hub(name: str, config: str | None) -> DatasetDict:
    try:
        return load_dataset(name, name=config)
    except DatasetNotFoundError as error:
        raise InputError(
            f"dataset_name: {name}: no such local file, and no such dataset on the Hub; check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    # A DNS failure, an HTTP error or a refused loading script: all of them are about the name or the connection.
    except Exception as error:
        raise InputError(
            f"dataset_name: {name} cannot be reached or read: {_first_line(error)}; check the name, dataset_config and the "
            "connection, or name a local file"
        ) from error


def _read_file(path: Path) -> Dataset:
    suffix = path.suffix.lower()
    if suffix not in _BUILDERS:
        raise InputError(f"a dataset file must end in {', '.join(_BUILDERS)}, got {path}; convert it to one of them")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; check the dataset")
    options: dict[str, Any] = {}
    if suffix == ".jsonl":
        _check_json_lines(path)
    elif suffix == ".json":
        options = _check_json(path)
    try:
        return load_dataset(_BUILDERS[suffix], data_files=str(path), split="train", **options)
    except Exception as error:
        # The reason is in the cause of a DatasetGenerationError.
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise InputError(
            f"{path} cannot be read as rows of one shape: {_first_line(reason)}; give every row the same keys and types"
        ) from error


def _check_json_lines(path: Path) -> None:
    problems: list[str] = []
    count = rows = 0
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            rows += 1
            problem = _problem_of(line)
            if problem:
                count += 1
                if len(problems) < _SHOWN_ERRORS:
                    problems.append(f"line {number} ({problem})")
    if count:
        more = f" and {count - len(problems)} more" if count > len(problems) else ""
        raise InputError(f"every line of {path} must be one JSON object, got {', '.join(problems)}{more}; correct them")
    if rows == 0:
        raise InputError(f"{path} holds only blank lines; check the dataset")


def _problem_of(line: str) -> str | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return f"{error.msg} at column {error.colno}"
    return None if isinstance(value, dict) else f"a {type(value).__name__}"


def _check_json(path: Path) -> dict[str, Any]:
    """The options that `datasets` needs for this layout: a list of objects, one list inside an object, or JSON lines."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if _problem_of(next((line for line in text.splitlines() if line.strip()), "")) is None:
            _check_json_lines(path)
            return {}
        raise InputError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}; correct it"
        ) from error
    lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    options = {"field": lists[0]} if len(lists) == 1 else {}
    rows = content[lists[0]] if options else content
    if isinstance(rows, dict) and not lists:
        return {}  # One JSON line.
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} must be a list of JSON objects, got {type(rows).__name__}; write [{{...}}, {{...}}]")
    if not rows:
        raise InputError(f"{path} holds an empty list; check the dataset")
    return options


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
