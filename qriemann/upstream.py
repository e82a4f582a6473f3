"""Every private part, patch and warning filter of other libraries that qriemann relies on, each with the reason.

Written for transformers 5.23, TRL 1.16, PEFT 0.21, datasets 5.2, bitsandbytes 0.50 and gguf 0.19. An entry names the test
that fails once upstream has changed, or that passes without the entry once it can go. Libraries are imported where they are
used, so importing this module costs nothing.
"""

from __future__ import annotations

import copy
import datetime
import functools
import glob
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraVariant as LoraVariant
    from peft.tuners.tuners_utils import check_target_module_exists as check_target_module_exists
    from peft.utils.other import get_pattern_key as get_pattern_key

# PEFT calls LoraVariant private: it replaces the forward of any LoRA layer, 4-bit or not, without a subclass. The other two
# are how PEFT matches layers with the names in a configuration. Contract: tests/adapters/test_peft_contract.py.
_HOME = {
    "LoraVariant": "peft.tuners.lora.layer",
    "check_target_module_exists": "peft.tuners.tuners_utils",
    "get_pattern_key": "peft.utils.other",
}

# Warnings about what neither a user nor this project can change, by the start of their text.
_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # PEFT 0.21 reads an attribute that transformers 5.23 renamed; goes when `pytest tests/adapters` passes without the same
    # filter in pyproject.toml.
    (".is_gradient_checkpointing. is deprecated", FutureWarning),
    # At every save PEFT looks for the base's configuration on the Hub, to learn whether the vocabulary has grown; goes when
    # tests/training/test_run.py passes without it.
    ("Unable to fetch remote file", UserWarning),
    ("Could not find a config file in", UserWarning),
    # PEFT warns of a base with tied embeddings, which the commands that read an adapter untie, and of what it sets by itself
    # for a Conv1D. Both go when tests/release/test_kinds.py passes without them.
    ("Model has `tie_word_embeddings=True`", UserWarning),
    ("fan_in_fan_out is set to", UserWarning),
    # PEFT warns of trained biases when an adapter is disabled; the evaluation puts the base's own back. Goes when
    # tests/release passes without it.
    ("Careful, disabling adapter layers", UserWarning),
    # PEFT warns of every adapter on a tied layer; what of them cannot be merged or read later is refused by name.
    ("Model has `tie_word_embeddings=True` and a tied layer is part", UserWarning),
)

# Log lines of the same kind: the logger, and words of the line.
_NOTICES = (
    # bitsandbytes 0.50, imported on a CPU with AVX512-BF16: it looks on the Hub for a kernel that nothing here uses.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    # A table of the tensors that a model's files lack or have too many; `check_loaded` names those that matter.
    ("transformers.modeling_utils", "LOAD REPORT"),
    # A share of the steps against the steps it came to, and what a resumed run takes from its settings anyway.
    ("transformers.trainer_utils", "The following arguments do not match the ones"),
    # `find_best_again` finds it, or says so.
    ("transformers.trainer", "recorded in the resumed state does not"),
    # Of the base's own generation_config.json.
    ("transformers.generation.configuration_utils", "The following generation flags are not valid"),
    # A card without a heading of its own gets one.
    ("huggingface_hub.repocard", "Repo card metadata block was not found"),
    # What datasets does about a number of processes that is too large.
    ("datasets.builder", "Setting num_proc from"),
    ("datasets.arrow_dataset", "num_proc must be <="),
    ("datasets.arrow_dataset", "Setting TOKENIZERS_PARALLELISM=false"),
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


@contextmanager
def quiet(*, bars: bool | None = None) -> Iterator[None]:
    """Hides upstream's progress bars where the output is no terminal, and the warnings that nobody can act on.

    A bar redraws itself with control characters, which a log keeps. datasets, transformers, TRL and huggingface_hub each
    have a switch of their own; all draw with tqdm, so one switch there serves libraries that are imported later as well.

    Args:
        bars: whether bars are shown; None shows them if stderr is a terminal.
    """
    with warnings.catch_warnings():
        for message, category in _WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        # They stay hidden after the block: a library may be imported only then. The same filter is added once.
        for logger in {name for name, _ in _NOTICES}:
            logging.getLogger(logger).addFilter(_says_something)
        if sys.stderr.isatty() if bars is None else bars:
            yield
            return
        from tqdm.std import tqdm

        draw = tqdm.__init__

        @functools.wraps(draw)
        def hidden(self: Any, *args: Any, **options: Any) -> None:
            draw(self, *args, **options | {"disable": True})

        tqdm.__init__ = hidden
        try:
            yield
        finally:
            tqdm.__init__ = draw


def _says_something(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(record.name == name and words in message for name, words in _NOTICES)


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Within the block, TRL's trainers report to nobody unless HF_HUB_DISABLE_TELEMETRY is set to 0.

    TRL sends the kind of trainer, model, GPU and data source to a server of its own for each trainer that it makes;
    tests/training/test_reporting.py
    """
    from trl.trainer import base_trainer

    send = base_trainer.send_telemetry
    if os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1").upper() not in ("0", "OFF", "NO", "FALSE"):
        base_trainer.send_telemetry = lambda **_: None
    try:
        yield
    finally:
        base_trainer.send_telemetry = send


def _attribute(name: str) -> Any:
    """A property that stands for a private attribute of the trainer."""

    def write(self: TrainerCounts, value: Any) -> None:
        setattr(self.trainer, name, value)

    return property(lambda self: getattr(self.trainer, name), write)


class TrainerCounts:
    """What transformers' Trainer and TRL's trainers count in private attributes; tests/checkpoints/test_step_guard.py.

    Attributes:
        loss_sum: the tensor that losses are added to since the last log.
        total_loss: the sum of all losses that were logged.
        last_logged_step, first_step: the step of the last log, and the one that the run began with.
        batch_size: rows a device takes in one batch.
    """

    loss_sum = _attribute("_tr_loss")
    total_loss = _attribute("_total_loss_scalar")
    last_logged_step = _attribute("_globalstep_last_logged")
    first_step = _attribute("_initial_global_step")
    batch_size = _attribute("_train_batch_size")

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @property
    def metrics(self) -> dict[str, list[float]]:
        """What a TRL trainer averages beside the loss until the next log; empty for other trainers."""
        return getattr(self.trainer, "_metrics", {}).get("train", {})

    @property
    def tokens(self) -> int:
        """The tokens that a TRL trainer has seen; 0 for other trainers."""
        return getattr(self.trainer, "_total_train_tokens", 0)

    @tokens.setter
    def tokens(self, count: int) -> None:
        if hasattr(self.trainer, "_total_train_tokens"):
            self.trainer._total_train_tokens = count

    def saved(self) -> Callable[[], None]:
        """A function that sets TRL's metrics and token count back to what they are now, as often as it is called."""
        names = ("_metrics", "_total_train_tokens")
        saved = {name: copy.deepcopy(vars(self.trainer)[name]) for name in names if name in vars(self.trainer)}
        return lambda: vars(self.trainer).update(copy.deepcopy(saved))

    def to_device(self, batch: Any) -> Any:
        """The batch on the trainer's device, as the trainer moves it."""
        return self.trainer._prepare_inputs(batch)


def token_sums(trainer: Any, model: Any, inputs: Any) -> Any:
    """Summed over the counted tokens of a batch: negative log likelihood, number, entropy and right predictions.

    They come from the head that TRL fuses with its loss, which never holds all logits; tests/training/test_held_out_loss.py

    Returns:
        float64, of shape (4,).
    """
    import torch

    inputs = trainer._prepare_inputs(inputs)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    parts = (-outputs.log_probs, outputs.label_mask, outputs.entropy, outputs.is_top1)
    return torch.stack([part.double().sum() for part in parts])


def keep_input_dtype(layer: Any) -> None:
    """Lets a PEFT layer hand its input on as it came while every active variant has `takes_any_dtype`.

    Otherwise PEFT keeps a float32 copy of the input alive in every wrapped layer, because the factors are float32. The switch
    that it offers, `cast_input_dtype_enabled`, would reach the other adapters of the layer. tests/adapters/test_layer.py
    """
    # Not a closure: deepcopy must bind the copy of the layer.
    layer._cast_input_dtype = functools.partial(_cast_input_dtype, layer)


def _cast_input_dtype(layer: Any, x: Any, dtype: Any) -> Any:
    active = (layer.lora_variant.get(name) for name in layer.active_adapters)
    if all(getattr(variant, "takes_any_dtype", False) for variant in active):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)


def replace_peft_functions(wrappers: dict[str, Callable[[Any], Any]]) -> None:
    """Puts what each wrapper makes of a function of PEFT in that function's place, once for the process.

    `add_weighted_adapter` and hot-swapping use the factors of a layer, where PEFT knows nothing of a variant.
    tests/adapters/test_peft_methods.py

    Args:
        wrappers: by "module:name" below peft; a dot in the name leads into a class.
    """
    for place, wrap in wrappers.items():
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(f"peft.{module}")
        *classes, name = path.split(".")
        for inner in classes:
            owner = getattr(owner, inner)
        function = getattr(owner, name)
        if not hasattr(function, "takes_attached_layers"):
            replacement = wrap(function)
            replacement.takes_attached_layers = True
            setattr(owner, name, replacement)


def attention_of(config: Any) -> str:
    """The attention implementation that a transformers model computes with; tests/memory/test_dry_run.py."""
    return config._attn_implementation


def set_attention(config: Any, implementation: str) -> None:
    """Sets the attention of a configuration whose model is still to be built; tests/base/test_load.py."""
    config._attn_implementation = implementation


def set_name(model: Any, name: str) -> None:
    """Sets the name that PEFT saves as `base_model_name_or_path`; tests/base/test_load.py."""
    model.name_or_path = model.config._name_or_path = name


def name_of(model: Any) -> str:
    """The name or path that the model was loaded from; empty if it has none."""
    return getattr(getattr(model, "config", None), "_name_or_path", "")


def has_causal_lm(config: Any) -> bool:
    """Whether transformers has a causal language model for the configuration's class; tests/memory/test_plan.py."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping


def names_of_experts(model: Any) -> frozenset[str]:
    """Names of layers that PEFT takes for the fused experts of this kind of model, even where a linear layer has the name.

    Their adapters would sit on three-dimensional parameters and take no dropout; tests/adapters/test_experts.py
    """
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    kind = _MODEL_TO_CONVERSION_PATTERN.get(getattr(getattr(model, "config", None), "model_type", None))
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(kind, ()))


@contextmanager
def watching_quantization(watch: Callable[[str, Any], None]) -> Iterator[None]:
    """Within the block, `watch` sees each weight by its name before transformers stores it in 4 bit.

    transformers offers no such hook, and afterwards NaN does not show: on a GPU the largest number of a block is found by
    comparisons, which pass over it. tests/base/test_files.py
    """
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    convert = Bnb4bitQuantize.convert

    def watched(self: Any, input_dict: dict[str, Any], **options: Any) -> Any:
        for name, value in input_dict.items():
            watch(name, value[0] if isinstance(value, list) else value)
        return convert(self, input_dict, **options)

    Bnb4bitQuantize.convert = watched
    try:
        yield
    finally:
        Bnb4bitQuantize.convert = convert


@contextmanager
def today_is(day: datetime.date) -> Iterator[None]:
    """Within the block, chat templates that ask transformers for the date (`strftime_now`) get this day.

    transformers hands no function from outside to a template. tests/data/test_chat_templates.py
    """
    from transformers.utils import chat_template_utils as module

    clock = module.datetime
    module.datetime = SimpleNamespace(now=lambda: datetime.datetime.combine(day, datetime.time()))
    try:
        yield
    finally:
        module.datetime = clock


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

    module.resolve_pattern = literal
    try:
        yield
    finally:
        module.resolve_pattern = resolve


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
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map

    class ArrayReader(reader):  # type: ignore[misc, valid-type]
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

    gguf.GGUFReader = functools.lru_cache(maxsize=1)(ArrayReader)
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def take_one_gpu(args: Any) -> None:
    """Lets a process that no launcher started train on its first visible GPU, the device of the arguments, alone.

    transformers would wrap the model in `nn.DataParallel` for all of them, which TRL refuses. Ask for the arguments' device
    first. tests/test_device.py
    """
    args._n_gpu = min(args.n_gpu, 1)


def is_4_bit(layer: Any) -> bool:
    """Whether the layer is a `Linear4bit` of bitsandbytes, told by the switch that `keep_unpacked` needs."""
    return hasattr(layer, "support_avx512bf16_for_cpu")


def was_conv1d(layer: Any) -> bool:
    """Whether a 4-bit layer was quantized from a Conv1D, whose weight a checkpoint has transposed.

    tests/release/test_kinds.py
    """
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(layer, "source_cls", object), Conv1D)


def untie(model: Any) -> None:
    """Gives the output head of a model with tied embeddings a weight of its own, in place; tests/release/test_kinds.py."""
    from torch import nn

    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def is_repacked(layer: Any) -> bool:
    """Whether bitsandbytes has repacked the layer's 4-bit weight for inference on this CPU."""
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def keep_unpacked(layer: Any) -> None:
    """Forbids bitsandbytes to repack a 4-bit weight, after which no gradient flows through the layer.

    On CPUs with AVX512-BF16 it does so in the first forward in eval mode without grad, and never unpacks the weight: the
    base's bytes have changed then, and training fails in train mode too. Goes when tests/base/test_quantized.py passes
    without it.
    """
    layer.support_avx512bf16_for_cpu = False


def set_compute_dtype(layer: Any, dtype: Any) -> None:
    """Makes a 4-bit layer compute in `dtype` instead of the dtype its checkpoint names; tests/base/test_load.py."""
    layer.compute_dtype = dtype
    layer.compute_type_is_set = True
