"""Every private part, patch and warning filter of other libraries that qriemann relies on, each with the reason.

Written for transformers 5.23, TRL 1.16, PEFT 0.21, datasets 5.2, bitsandbytes 0.50 and gguf 0.19. An entry names the test
that fails once upstream has changed, or that passes without the entry once it can go. Libraries are imported where they are
used, so importing this module costs nothing.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
)

# Log lines of the same kind: the logger, and how the line begins.
_NOTICES = (
    # bitsandbytes 0.50, imported on a CPU with AVX512-BF16: it looks on the Hub for a kernel that nothing here uses.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
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
        for logger, beginning in _NOTICES:
            logging.getLogger(logger).addFilter(functools.partial(_begins_otherwise, beginning))
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


def _begins_otherwise(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


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
def gguf_parsed_once() -> Iterator[None]:
    """Within the block, gguf parses each file once and builds each table of tensor names once.

    transformers parses the header (50,000 tokens and as many merges) four times while it loads a model and its tokenizer,
    4 s each on one core, and builds the table for every module of the model. Shared, and with the file seen as a plain array
    (slices of a memmap cost three times as much), the embedded model loads in 13 s instead of 35 s. Goes when loading it
    takes as long without.
    """
    import numpy as np

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
