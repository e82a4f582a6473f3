"""The files of a base model, which anybody may have written: what transformers would take from them without a word.

Looked at before anything is built: paths that leave the folder, weights that are not floats, and a configuration that asks
for far more than the weights can fill. Looked at afterwards: weights that were drawn at random because none were stored, or
stored in another shape, and numbers that are not finite.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from qriemann.adapters.finite import is_finite
from qriemann.adapters.saved_config import entries, refuse_outside
from qriemann.base.chat_template import refuse_endless_template
from qriemann.errors import InputError

_WEIGHTS, _INDEX, _TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer_config.json"
# What transformers 5.23 takes for a file's name or for the content of a file that it names.
_NAMES_A_FILE = re.compile(r".*_files?|vocab|merges|init_inputs")
# Where the tokenizer was once loaded from, on whoever's machine; transformers writes them and never reads them.
_ONLY_HISTORY = ("special_tokens_map_file", "tokenizer_file")
# Twice because a matrix may be stored once and stand for the embeddings and the head.
_MOST_PER_STORED = 2


def load_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or Hub id.

    Raises:
        InputError: its tokenizer_config.json names a file outside of the folder, or its chat template has no end.
        Exception: whatever transformers raises on a broken one.
    """
    path = _find(source, _TOKENIZER, options.get("revision"))
    if path is not None:
        for key, value in entries(json.loads(Path(path).read_text("utf-8"))):
            if _NAMES_A_FILE.fullmatch(key) and key not in _ONLY_HISTORY:
                refuse_outside(path, key, value, "remove it or copy it there")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    refuse_endless_template(tokenizer)
    return tokenizer


def check_weight_files(
    source: str, config: transformers.PreTrainedConfig, revision: str | None, *, trust_remote_code: bool
) -> None:
    """Raises InputError unless the safetensors files of a local folder or Hub id are its own and enough for `config`.

    A model on the Hub is downloaded by this. Only the files' headers are read. Without a safetensors file nothing is checked.
    """
    file = _find(source, _WEIGHTS, revision)
    files = [] if file is None else [file]
    index = _find(source, _INDEX, revision) if file is None else None
    if index is not None:
        for key, value in json.loads(Path(index).read_text("utf-8"))["weight_map"].items():
            refuse_outside(index, key, value, "download the model again")
        files = get_checkpoint_shard_files(source, index, revision=revision)[0]
    in_4_bit = hasattr(config, "quantization_config")
    stored = [count for path in files for count in _stored_numbers(path, in_4_bit=in_4_bit)]
    if not stored:
        return
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(stored):
        raise InputError(
            f"num_hidden_layers must be at most the number of tensors stored, {len(stored)}, got {layers} in {source!r}; "
            "download the model again, or correct its config.json"
        )
    # Code that came with the model and is trusted to run might be fetched in another revision here.
    if trust_remote_code:
        return
    # Built without memory for its weights, in 0.1 s for 32 layers.
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    asked = sum(weight.numel() for weight in skeleton.parameters())
    if asked > _MOST_PER_STORED * sum(stored):
        raise InputError(
            f"config.json must describe a model that its weights fill, got {asked:,} weights to fill from {sum(stored):,} "
            f"numbers in {source!r}; download it again, or correct config.json"
        )


def check_loaded(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raises InputError if `from_pretrained` drew a weight at random, going by the `report` that it gives when asked."""
    # A tied head, and what a class says may be left out, are not in it.
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"a model must hold every weight that its config.json asks for, got none for {_listed(missing)} in {name!r}; "
            "download it again, or correct config.json"
        )
    mismatched = sorted([*report["mismatched_keys"], *_mismatched_4_bit(model)])
    if mismatched:
        shapes = [f"{key} of {tuple(found)} for {tuple(expected)}" for key, found, expected in mismatched]
        raise InputError(
            f"weights must have the shapes that config.json asks for, got {_listed(shapes)} in {name!r}; download it again, "
            "or correct config.json"
        )


@contextmanager
def noting_what_is_quantized() -> Iterator[list[str]]:
    """Within the block, the names of weights with NaN or infinities are noted before transformers stores them in 4 bit.

    Afterwards they would not show: on a GPU the largest number of a block is found by comparisons, which pass over a NaN.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    noted: list[str] = []
    convert = Bnb4bitQuantize.convert

    def noting(self: Any, input_dict: dict[str, Any], **options: Any) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            if not is_finite(value[0] if isinstance(value, list) else value):
                noted.append(name)
        return convert(self, input_dict, **options)

    Bnb4bitQuantize.convert = noting
    try:
        yield noted
    finally:
        Bnb4bitQuantize.convert = convert


def check_finite(name: str, model: PreTrainedModel, noted: list[str]) -> None:
    """Raises InputError if a weight of the model is not finite, or `noted` as such before it was quantized."""
    found = [key for key, weight in model.named_parameters() if not all(map(is_finite, _floats_of(weight)))]
    if found := list(dict.fromkeys(noted + found)):
        raise InputError(
            f"weights must be finite numbers in {model.dtype}, got NaN or infinities in {_listed(found)} of {name!r}; "
            "download the model again, or load it with dtype float32"
        )


def _find(source: str, file: str, revision: str | None) -> str | None:
    return cached_file(
        source,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
    )


def _stored_numbers(path: str, *, in_4_bit: bool) -> Iterator[int]:
    """How many numbers each tensor of a file can hold at the most."""
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            stored = file.get_slice(key)
            kind, count = str(stored.get_dtype()), math.prod(stored.get_shape())
            # Masks and positions may be integers; a 4-bit weight is stored as bytes, or as if its bytes were floats.
            if key.endswith(".weight") and "F" not in kind and not (in_4_bit and kind == "U8"):
                raise InputError(
                    f"weights must be floating-point numbers, got {kind} for {key!r:.80} in {path}; convert the model again"
                )
            bits = re.search(r"\d+", kind)
            yield count * int(bits[0]) // 4 if in_4_bit and bits else count


def _mismatched_4_bit(model: PreTrainedModel) -> Iterator[tuple[str, Any, Any]]:
    """Names and shapes, found and expected: transformers 5.23 compares none of the weights that it stores in 4 bit."""
    layer: Any
    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        expected = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        if state is not None and tuple(state.shape) != expected:
            yield f"{name}.weight", state.shape, expected


def _floats_of(weight: Tensor) -> list[Tensor]:
    """The tensors that hold what a weight's numbers are scaled by; the weight itself if it is not quantized."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight]
    return [state.absmax] if not state.nested else [state.offset, state.state2.absmax]


def _listed(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
