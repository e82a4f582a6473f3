"""Checks on the files of a base model that transformers does not make.

Before loading: no path leaves the folder. After loading: no weight was initialized at random because the files hold none of
that name or shape, and every number is finite.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from qriemann.base.tensors import is_finite
from qriemann.errors import InputError, listed
from qriemann.folder.files import entries, refuse_outside
from qriemann.upstream import watching_quantization

_INDEX, _TOKENIZER = "model.safetensors.index.json", "tokenizer_config.json"
_DOWNLOAD = "download the model again, or correct config.json"
# The keys whose values transformers 5.23 opens as files.
_NAMES_A_FILE = re.compile(r".*_files?|vocab|merges|init_inputs")
# transformers writes these, with the paths on the machine that saved the tokenizer, and never reads them.
_ONLY_HISTORY = ("special_tokens_map_file", "tokenizer_file")


def load_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or Hub id.

    Raises:
        InputError: its tokenizer_config.json names a file outside the folder.
        Exception: whatever transformers raises on a broken one.
    """
    path = _find(source, _TOKENIZER, options.get("revision"))
    if path is not None:
        for key, value in entries(json.loads(Path(path).read_text("utf-8"))):
            if _NAMES_A_FILE.fullmatch(key) and key not in _ONLY_HISTORY:
                refuse_outside(path, key, value, "remove it or copy it there")
    return transformers.AutoTokenizer.from_pretrained(source, **options)


def check_index(source: str, revision: str | None) -> None:
    """Raises InputError if the index of the safetensors files of a folder or Hub id names one outside of it."""
    index = _find(source, _INDEX, revision)
    if index is not None:
        for key, value in json.loads(Path(index).read_text("utf-8"))["weight_map"].items():
            refuse_outside(index, key, value, "download the model again")


def check_loaded(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raises InputError if `from_pretrained` initialized a weight at random, according to its own `report`."""
    # The report leaves out a tied head and the weights that the class declares optional.
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{name}: the files hold no weights for {listed(missing)}, which config.json asks for; {_DOWNLOAD}"
        )
    mismatched = sorted([*report["mismatched_keys"], *_mismatched_4_bit(model)])
    if mismatched:
        shapes = [f"{key} of {tuple(found)} for {tuple(expected)}" for key, found, expected in mismatched]
        raise InputError(f"{name}: other shapes than config.json asks for, {listed(shapes)}; {_DOWNLOAD}")


@contextmanager
def noting_what_is_quantized() -> Iterator[list[str]]:
    """Within the block, lists the names of weights that hold NaN or infinities when they are stored in 4 bit."""
    noted: list[str] = []

    def note(name: str, weight: Tensor) -> None:
        if not is_finite(weight):
            noted.append(name)

    with watching_quantization(note):
        yield noted


def check_finite(name: str, model: PreTrainedModel, noted: list[str]) -> None:
    """Raises InputError if a weight of the model is not finite, or was `noted` as such before it was quantized."""
    found = [key for key, weight in model.named_parameters() if not all(map(is_finite, _floats_of(weight)))]
    if found := list(dict.fromkeys(noted + found)):
        raise InputError(
            f"{name}: NaN or infinities in {listed(found)}; download the model again, or load it with dtype float32"
        )


def _find(source: str, file: str, revision: str | None) -> str | None:
    return cached_file(
        source,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
    )


def _mismatched_4_bit(model: PreTrainedModel) -> Iterator[tuple[str, Any, Any]]:
    """Names and shapes, found and expected: transformers 5.23 does not compare the weights that it stores in 4 bit."""
    layer: Any
    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        expected = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        if state is not None and tuple(state.shape) != expected:
            yield f"{name}.weight", state.shape, expected


def _floats_of(weight: Tensor) -> list[Tensor]:
    """The weight itself, or the scales of a quantized one."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight]
    return [state.absmax] if not state.nested else [state.offset, state.state2.absmax]
