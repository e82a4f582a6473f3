"""Private parts of what reads data, chat templates and GGUF files."""

import datetime
import functools
import glob
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qriemann.upstream.noise import replaced


@contextmanager
def today_is(day: datetime.date) -> Iterator[None]:
    """Within the block, chat templates that ask transformers for the date (`strftime_now`) get this day.

    transformers hands no function from outside to a template. tests/data/test_chat_templates.py
    """
    from transformers.utils import chat_template_utils as module

    clock = SimpleNamespace(now=lambda: datetime.datetime.combine(day, datetime.time()))
    with replaced(module, "datetime", clock):
        yield


@contextmanager
def literal_folders() -> Iterator[None]:
    """Within the block, datasets takes the path of a local folder as it is, and only what follows as a pattern.

    It writes its patterns behind the folder's path and reads `data[v2]` as a pattern as well. tests/data/test_files.py
    """
    from datasets import data_files as module

    resolve = module.resolve_pattern

    @functools.wraps(resolve)
    def literal(pattern: str, base_path: str, *args: Any, **options: Any) -> list[str]:
        return resolve(pattern, base_path if "://" in base_path else glob.escape(base_path), *args, **options)

    with replaced(module, "resolve_pattern", literal):
        yield


@contextmanager
def gguf_parsed_once(parts: Sequence[Path] = ()) -> Iterator[None]:
    """Within the block, gguf parses each file once, joins split ones, and builds each table of tensor names once.

    transformers reads the first file of a split model alone: with `parts`, all files of one model in order, the reader of the
    first has the tensors of all. tests/base/test_load.py

    transformers parses the header (50,000 tokens and as many merges) four times while it loads a model and its tokenizer,
    4 s each on one core, and builds the table for every module of the model. Shared, and with the file seen as a plain array
    (slices of a memmap cost three times as much), the embedded model loads in 13 s instead of 35 s. Goes when loading it
    takes as long without.
    """
    import numpy as np

    gguf: Any = importlib.import_module("gguf")

    class ArrayReader(gguf.GGUFReader):  # type: ignore[misc, valid-type]
        def __init__(self, path: str, *args: Any) -> None:
            super().__init__(path, *args)
            if parts and Path(path) == parts[0]:
                self.tensors += [tensor for part in parts[1:] for tensor in ArrayReader(str(part)).tensors]

        @property
        def data(self) -> np.ndarray:
            return self._array

        @data.setter
        def data(self, file: np.memmap) -> None:
            self._array = file.view(np.ndarray)

    once = functools.lru_cache(maxsize=1)
    with (
        replaced(gguf, "GGUFReader", once(ArrayReader)),
        replaced(gguf, "get_tensor_name_map", once(gguf.get_tensor_name_map)),
    ):
        yield
