"""Reads the rows of a local file as they are written: no type is inferred, no cell changes, nothing is cached.

Rows of JSON and CSV stay JSON text, one object a row, until they are tokenized: Arrow would give a column one type and every
object the same keys, so "007" becomes 7, and a tool's arguments gain the keys of all other tools.
"""

import codecs
import csv
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from pyarrow import parquet

from qriemann.data.row_formats import is_row
from qriemann.errors import InputError, first_line, listed

#: The column of rows that are JSON objects.
JSON_COLUMN = "row as JSON"

# A row after the last one: a quotation mark that is never closed swallows it.
_LAST = "\x03end of the file"


def read_files(paths: Iterable[Path]) -> tuple[Dataset, list[str]]:
    """The rows of local files, one after the other, and the names of their columns."""
    columns: dict[str, None] = {}
    parts = [_read(path, columns) for path in paths]
    if len(parts) == 1:
        return parts[0], [*columns]
    try:
        return concatenate_datasets(parts), [*columns]
    except (ValueError, pa.ArrowInvalid) as error:
        raise InputError(f"the files of one split must have the same columns and types: {first_line(error)}") from error


def _read(path: Path, columns: dict[str, None]) -> Dataset:
    try:
        rows = _READERS[path.suffix.lower()](path, columns)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {first_line(error)}; write it again") from error
    return rows if isinstance(rows, Dataset) else Dataset(pa.table({JSON_COLUMN: pa.array(rows, pa.large_string())}))


def _parquet(path: Path, columns: dict[str, None]) -> Dataset:
    rows = Dataset(parquet.ParquetFile(path).read())
    columns.update(dict.fromkeys(rows.column_names))
    return rows


def _json_lines(path: Path, columns: dict[str, None]) -> list[str]:
    texts: list[str] = []
    problems: list[str] = []
    # As bytes, lines end at a line feed and nowhere else: JSON text may hold U+2028 and its like.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if not line:
                continue
            try:
                texts.append(line.decode())
                columns.update(dict.fromkeys(_object(texts[-1])))
            except (ValueError, RecursionError) as error:
                problems.append(f"line {number} ({_reason(error)})")
    if problems:
        raise InputError(f"every line of {path} must be one JSON object, got {listed(problems)}; correct them")
    return texts


def _json(path: Path, columns: dict[str, None]) -> list[str]:
    """A list of objects, one list inside an object, a single object, or JSON lines."""
    text = ""
    try:
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
        content = json.loads(text)
        _refuse_half_characters(text, content)
    except (ValueError, RecursionError) as error:
        where = ""
        if isinstance(error, json.JSONDecodeError):
            # More than one object, the first on a line of its own.
            if error.msg == "Extra data" and "\n" not in text[: error.pos].strip():
                return _json_lines(path, columns)
            where = f"line {error.lineno}, "
        raise InputError(f"{path} is not valid JSON: {where}{_reason(error)}; correct it") from error
    rows = _rows_of(content) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(f"{path} must be a list of JSON objects, got {type(rows).__name__}; write [{{...}}, {{...}}]")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path} must be a list of JSON objects, got a {type(row).__name__} as row {number}")
        columns.update(dict.fromkeys(row))
    return [json.dumps(row) for row in rows]


def _rows_of(content: dict[str, Any]) -> list[Any]:
    """The one list of rows inside an object, such as {"version": 1, "data": [...]}; otherwise the object is one row."""
    lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if is_row(content) or len(lists) != 1 or {"role", "from"} & {*lists[0][0]}:
        return [content]
    return lists[0]


def _csv(path: Path, columns: dict[str, None]) -> list[str]:
    # The longest cell; the default is 131,072 characters.
    csv.field_size_limit(2**31 - 1)
    texts: list[str] = []
    names: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells: list[str] = []
            reader = csv.reader(itertools.chain(file, [_LAST]))
            for cells in reader:
                if not names:
                    names = [name or f"column {place}" for place, name in enumerate(cells, start=1)]
                elif any(cells[len(names) :]):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells for {len(names)} columns; quote any with commas"
                    )
                elif cells and cells != [_LAST]:
                    texts.append(json.dumps(dict(zip(names, cells, strict=False)), ensure_ascii=False))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path} is not valid CSV: {error}; correct it") from error
    if cells != [_LAST]:
        raise InputError(f"{path} is not valid CSV: a quotation mark is never closed; correct it")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path} has {len(twice)} columns twice ({', '.join(sorted(twice))}); rename them")
    columns.update(dict.fromkeys(names))
    return texts


def _object(text: str) -> dict[str, Any]:
    """The JSON object that a text is; raises ValueError for anything else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    _refuse_half_characters(text, value)
    return value


def _refuse_half_characters(text: str, value: Any) -> None:
    """Raises UnicodeEncodeError for half of a surrogate pair, which no tokenizer takes."""
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start + 1}"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:80]


# By the ending, one for each of `ROW_FILES`.
_READERS: dict[str, Callable[[Path, dict[str, None]], list[str] | Dataset]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
