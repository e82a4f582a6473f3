"""Settings of one run: a flat YAML file in TRL's argument style, overridden by `--key value` on the command line.

The keys are the fields of four dataclasses: TRL's `SFTConfig` as it is, TRL's `ModelConfig` and `ScriptArguments` with the
defaults of this project, and `QRiemannConfig`. A key that this project decides by itself (DoRA, `optim`, ...) stays known, so
that a configuration written for TRL is refused by name with the reason rather than half obeyed.

Only what the user wrote is passed on to `SFTConfig`; every other default is TRL's, except those in `_own_defaults`, which say
why. The dataclasses import trl, so this module is imported when a run is asked for and never by `import qriemann`.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from qriemann.config.values import PUBLIC_TOKEN_KEYS, convert, nearest, redact, shown
from qriemann.config.yaml_file import read_config_file
from qriemann.distributed import refuse_sharding
from qriemann.errors import InputError
from qriemann.folder.private import hide_credentials
from qriemann.optim.methods import METHODS

# Keys of TRL whose value this project decides: (the only value it accepts, why, what to write instead).
_FIXED: dict[str, tuple[Any, str]] = {
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
    "fsdp": (
        None,
        "FSDP shards the factors, and a step needs both of a layer whole; use accelerate launch --multi_gpu",
    ),
    "deepspeed": (None, "DeepSpeed flattens or shards the factors; use accelerate launch --multi_gpu"),
    "optim": (None, "the optimizer is chosen by method; remove the key"),
    "optim_args": (None, "the optimizer is chosen by method; use method_kwargs"),
    "optim_target_modules": (None, "the optimizer is chosen by method; use lora_target_modules"),
    "adam_beta1": (None, "the optimizer is chosen by method; use method_kwargs"),
    "adam_beta2": (None, "the optimizer is chosen by method; use method_kwargs"),
    "adam_epsilon": (None, "the optimizer is chosen by method; use method_kwargs"),
}

# Ranges of the keys that no library checks before the first step. lr, momentum and weight_decay belong to the method.
_RANGES: dict[str, tuple[float, float, str]] = {
    "lora_r": (1, float("inf"), "at least 1"),
    "lora_alpha": (1, float("inf"), "at least 1"),
    "lora_dropout": (0, 1 - 1e-9, "in [0, 1)"),
    "eval_size": (0, float("inf"), "at least 0 (below 1 a share of the rows, otherwise a number of rows)"),
    "num_train_epochs": (1e-9, float("inf"), "above 0"),
    "max_length": (2, float("inf"), "at least 2 tokens, or null for no limit"),
    "per_device_train_batch_size": (1, float("inf"), "at least 1"),
    "per_device_eval_batch_size": (1, float("inf"), "at least 1"),
    "gradient_accumulation_steps": (1, float("inf"), "at least 1"),
    "logging_steps": (1e-9, float("inf"), "above 0"),
    "warmup_steps": (0, float("inf"), "at least 0"),
    "max_grad_norm": (0, float("inf"), "at least 0"),
    "seed": (0, 2**32 - 1, "between 0 and 2**32 - 1"),
    "max_skipped_steps": (0, float("inf"), "at least 0"),
}

# Keys that mean one thing under two names.
_ALIASES = {
    "modules_to_save": "lora_modules_to_save",
    "resume_from_checkpoint": "resume",
    # transformers 5.23 renamed these and warns about the old names, TRL still writes them.
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


@dataclass
class ModelSettings(ModelConfig):
    """The base model and the shape of its adapter: TRL's `ModelConfig` with this project's defaults."""

    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Compute dtype. Default: bfloat16 on a GPU that has it, otherwise float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Always true: only the adapter is trained."})
    load_in_4bit: bool | None = field(default=None, metadata={"help": "TRL's name for quantize: nf4."})
    use_bnb_nested_quant: bool = field(default=True, metadata={"help": "Always true with quantize: nf4."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Numerator of the adapter's scaling. Default: lora_r, a scaling of 1."}
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers that get an adapter, or all-linear."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Layers trained in full, by AdamW, beside the adapter.", "aliases": ["--modules_to_save"]},
    )
    rank_pattern: dict | str | None = field(default=None, metadata={"help": "Rank by layer name, over lora_r."})
    alpha_pattern: dict | str | None = field(default=None, metadata={"help": "Alpha by layer name, over lora_alpha."})


@dataclass
class DataSettings(ScriptArguments):
    """Where the rows come from and which of them are held out: TRL's `ScriptArguments` plus the held-out rows."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A Hub id, or a local .jsonl, .json, .csv or .parquet file."}
    )
    dataset_eval_name: str | None = field(
        default=None, metadata={"help": "A second dataset or file to hold out. Default: see eval_size."}
    )
    dataset_columns: dict | str | None = field(
        default=None, metadata={"help": "Columns to rename, as {question: instruction, answer: output}."}
    )
    eval_size: float = field(
        default=0.05,
        metadata={
            "help": "Without a held-out split: the share (below 1) or number of training rows to hold out; 0 for none."
        },
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    max_eval_rows: int | None = field(
        default=200, metadata={"help": "Hold out at most so many rows, if eval_size is a share."}
    )


@dataclass
class QRiemannConfig:
    """What this project adds to TRL: the method, its start, the loss mask and what to do with an existing folder."""

    method: str = field(
        default="riemannion", metadata={"help": f"The optimizer: {', '.join(METHODS)}; see qriemann.for_trainer."}
    )
    start: str = field(
        default="offset",
        metadata={
            "help": "Where an adapter on the manifold starts: at alpha I with a frozen offset, or at zero.",
            "choices": ["offset", "zero"],
        },
    )
    alpha: float = field(default=1.0, metadata={"help": "Size of the offset start: S = alpha I."})
    init: str = field(
        default="random",
        metadata={
            "help": "The bases at the start: random, or from the gradient (locally optimal initialization).",
            "choices": ["random", "loi"],
        },
    )
    init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of qriemann.LocallyOptimalInit, as batches."}
    )
    momentum: float | None = field(default=None, metadata={"help": "Default: the method's."})
    method_kwargs: dict | str | None = field(default=None, metadata={"help": "Further arguments of the method."})
    quantize: str = field(default="nf4", metadata={"help": "The frozen base.", "choices": ["nf4", "none"]})
    offload_embeddings: bool = field(
        default=False,
        metadata={"help": "Keep the input embeddings in host memory; for models whose output head is another matrix."},
    )
    loss_on: str = field(
        default="assistant", metadata={"help": "Tokens that are trained.", "choices": ["assistant", "all"]}
    )
    resume: str | None = field(
        default=None, metadata={"help": "Continue from the last checkpoint of output_dir, or from a named one."}
    )
    allow: list[str] = field(
        default_factory=list, metadata={"help": "Names of refusals that are meant: as each refusal's message says."}
    )
    dry_run: bool = field(
        default=True, metadata={"help": "Take the longest batch through the model before the first step."}
    )
    auto_batch: bool = field(
        default=False,
        metadata={
            "help": "Measure how many rows fit at once; per_device_train_batch_size times gradient_accumulation_steps stay "
            "the rows of a step."
        },
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "Steps in a row without finite loss and gradient, above which a run stops."}
    )
    push: str | None = field(
        default=None, metadata={"help": "Push the adapter to this Hub repository at the end, OWNER/NAME."}
    )
    hub_base_id: str | None = field(
        default=None, metadata={"help": "The base on the Hub, for a push where model_name_or_path is local."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the run that output_dir holds."})
    display: str = field(
        default="auto", metadata={"help": "Live display or plain lines.", "choices": ["auto", "live", "plain", "none"]}
    )


_GROUPS = (QRiemannConfig, ModelSettings, DataSettings, SFTConfig)
_HINTS: dict[str, Any] = {key: hint for group in _GROUPS for key, hint in get_type_hints(group).items()}
# HfArgumentParser needs a `str` beside a mapping and refuses a `bool` there; these are the types that are really meant.
_HINTS |= {
    "resume": bool | str | None,
    "rank_pattern": dict | None,
    "alpha_pattern": dict | None,
    "method_kwargs": dict | None,
    # transformers answers a null with a warning about the old name of the key; here it is left out, as any other null.
    "activation_checkpointing": bool,
    "dataset_columns": dict | None,
    "init_kwargs": dict | None,
}
_FIELDS: dict[str, dataclasses.Field] = {item.name: item for group in _GROUPS for item in dataclasses.fields(group)}


@dataclass
class RunConfig:
    """One run, resolved and checked as far as that is possible without loading anything.

    Attributes:
        explicit: the keys that the user wrote; every other value is a default.
    """

    sft: SFTConfig
    model: ModelSettings
    data: DataSettings
    qriemann: QRiemannConfig
    explicit: frozenset[str]

    @property
    def quantize(self) -> str | None:
        """The argument of `load_base`."""
        return None if self.qriemann.quantize == "none" else self.qriemann.quantize

    def as_dict(self) -> dict[str, Any]:
        """Every setting of the run as one flat JSON-ready mapping, secrets redacted."""
        # transformers masks every key that ends in "_token", vocabulary entries included.
        sft = {**self.sft.to_dict(), **{key: getattr(self.sft, key) for key in PUBLIC_TOKEN_KEYS & _FIELDS.keys()}}
        groups = (sft, *(dataclasses.asdict(group) for group in (self.data, self.model, self.qriemann)))
        merged = {key: value for group in groups for key, value in group.items() if key not in _FIXED}
        # A credential may be part of any other value: a name, say.
        return json.loads(hide_credentials(json.dumps(redact(merged))))


def load_config(path: str | os.PathLike[str] | None, arguments: Sequence[str] = ()) -> RunConfig:
    """The configuration of a YAML file with the command line's `--key value` pairs laid over it.

    Args:
        path: the YAML file; None for the command line alone.
        arguments: what followed it on the command line.

    Raises:
        InputError: for a file that cannot be read, an unknown key, a wrong type or a value out of range.
    """
    from_file, environment = read_config_file(path) if path is not None else ({}, {})
    from_file = _check(from_file, f"in {path}")
    from_command_line = _parse_arguments(arguments)
    if from_file.get("trust_remote_code") and "trust_remote_code" not in from_command_line:
        raise InputError(
            f"trust_remote_code must be given on the command line, got it from {path} alone; if you have read the "
            "model's code, add --trust_remote_code"
        )
    config = config_from_values({**from_file, **from_command_line})
    os.environ.update(environment)
    return config


def config_from_values(values: Mapping[str, Any]) -> RunConfig:
    """The configuration made of Python values under the same keys as the YAML file.

    Raises:
        InputError: as `load_config`.
    """
    checked = _check(values, "in the settings")
    for key, (accepted, remedy) in _FIXED.items():
        if key in checked and checked[key] != accepted:
            raise InputError(f"{key} must be {accepted!r} or left out, got {shown(checked[key], key)}; {remedy}")
        checked.pop(key, None)
    if "output_dir" not in checked:
        raise InputError(
            "output_dir must be the folder for the adapter and its records, got none; add the key output_dir"
        )
    explicit = frozenset(checked)
    _reconcile_quantize(checked)
    groups = {group: {item.name for item in dataclasses.fields(group)} for group in _GROUPS}
    picked = {group: {key: checked[key] for key in names & checked.keys()} for group, names in groups.items()}
    # Before transformers reads the same variables, and looks for packages.
    refuse_sharding()
    sft_values = {**_own_defaults(explicit, use_cpu=bool(checked.get("use_cpu"))), **picked[SFTConfig]}
    try:
        sft = SFTConfig(**sft_values)
    # Some values are read as the name of a file or a package.
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the training arguments must agree with each other, got: {reason:.300}") from error
    qriemann = QRiemannConfig(**picked[QRiemannConfig])
    if isinstance(qriemann.resume, bool):
        qriemann.resume = "auto" if qriemann.resume else None
    if qriemann.resume and qriemann.overwrite:
        raise InputError(
            "resume and overwrite must not both be set, got both; one keeps the run, the other replaces it"
        )
    return RunConfig(
        sft=sft,
        model=ModelSettings(**picked[ModelSettings]),
        data=DataSettings(**picked[DataSettings]),
        qriemann=qriemann,
        explicit=explicit,
    )


def describe_options() -> list[tuple[str, str, str]]:
    """(key, default, help) of every key that is this project's own, for the command line's help text."""
    own = (QRiemannConfig, DataSettings, ModelSettings)
    return [
        (item.name, repr(_default(item)), str(item.metadata.get("help", "")))
        for group in own
        for item in dataclasses.fields(group)
        if item.name not in _FIXED
    ]


def _default(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _own_defaults(explicit: Collection[str], *, use_cpu: bool) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available() and not use_cpu
    defaults: dict[str, Any] = {
        # TRL's default is bf16 everywhere; on a CPU that is slower and less exact than float32.
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        # Recomputing activations buys memory with time; a CPU run is short of time.
        "activation_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
        # Every layer with an adapter takes part in every step; looking for those that do not is a walk over the graph a step.
        "ddp_find_unused_parameters": False,
        # A hundred points on the loss curve whatever the length of the run, ten held-out losses and one at the start.
        "logging_steps": 0.01,
        "eval_strategy": "steps",
        "eval_steps": 0.1,
        "eval_on_start": True,
        # The default replaces a NaN loss by the last finite average, so nobody sees it.
        "logging_nan_inf_filter": False,
        # Our display draws the progress.
        "disable_tqdm": True,
        "report_to": "none",
    }
    if "fp16" in explicit:
        defaults.pop("bf16")
    if "eval_strategy" in explicit:
        defaults.pop("eval_steps")
    return defaults


def _reconcile_quantize(checked: dict[str, Any]) -> None:
    load_in_4bit = checked.pop("load_in_4bit", None)
    if load_in_4bit is None:
        return
    meant = "nf4" if load_in_4bit else "none"
    if checked.setdefault("quantize", meant) != meant:
        raise InputError(
            f"load_in_4bit and quantize must agree, got {load_in_4bit} and {checked['quantize']!r}; remove one of them"
        )


def _check(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The values converted to their fields' types, aliases resolved; a null for a field that has no null is left out."""
    checked: dict[str, Any] = {}
    for written, value in values.items():
        name = written if isinstance(written, str) else shown(written)
        key = _ALIASES.get(name, name)
        if key not in _FIELDS:
            raise InputError(
                f"every key must be a known option, got {shown(written)} {origin}; did you mean "
                f"{nearest(key, _FIELDS)!r}?"
            )
        try:
            converted = convert(_HINTS[key], value, choices=_FIELDS[key].metadata.get("choices"))
        except ValueError as error:
            raise InputError(f"{key} must be {error}, got {shown(value, key)} {origin}; correct the value") from error
        if converted is None and value is None and type(None) not in getattr(_HINTS[key], "__args__", ()):
            continue
        if converted is not None and key in _RANGES:
            low, high, rule = _RANGES[key]
            if not low <= converted <= high:
                raise InputError(f"{key} must be {rule}, got {shown(value, key)} {origin}; correct the value")
        if key in checked:
            raise InputError(f"{key} must be given once, got it under two names {origin}; remove {shown(written)}")
        checked[key] = converted
    return checked


class _ArgumentParser(TrlParser):
    def error(self, message: str) -> Any:
        raise InputError(f"the command line must be `--key value` pairs, got: {message}")


def _parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    parser = _ArgumentParser(_GROUPS, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        # The parser only splits the line: types are checked by `convert`, as for the file, and a default that stays out of
        # the namespace leaves the keys that were really written.
        action.type = action.choices = None
        action.default, action.required = argparse.SUPPRESS, False
        if action.dest == "resume":
            action.nargs, action.const = "?", "auto"
    namespace, unknown = parser.parse_known_args(list(arguments))
    for argument in unknown:
        key = argument.partition("=")[0].lstrip("-").replace("-", "_")
        if not argument.startswith("--"):
            # The value may be a secret that is meant for the key before it.
            got = shown(argument.partition("=")[0])
            raise InputError(f"the command line must be `--key value` pairs, got {got}; write --key before it")
        raise InputError(
            f"every key must be a known option, got {key!r} on the command line; did you mean {nearest(key, _FIELDS)!r}?"
        )
    return _check(vars(namespace), "on the command line")
