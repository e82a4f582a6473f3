"""Private parts of transformers' models and of bitsandbytes' 4-bit layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qriemann.errors import InputError
from qriemann.upstream.noise import replaced


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

    with replaced(Bnb4bitQuantize, "convert", watched):
        yield


def is_4_bit(layer: Any) -> bool:
    """Whether the layer is a `Linear4bit` of bitsandbytes, told by the switch that `protect_quantized_weights` needs."""
    return hasattr(layer, "support_avx512bf16_for_cpu")


def was_conv1d(layer: Any) -> bool:
    """Whether a 4-bit layer was quantized from a Conv1D, whose weight a checkpoint has transposed.

    tests/release/test_kinds.py
    """
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(layer, "source_cls", object), Conv1D)


def is_repacked(layer: Any) -> bool:
    """Whether bitsandbytes has repacked the layer's 4-bit weight for inference on this CPU."""
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def protect_quantized_weights(model: Any) -> int:
    """Keeps bitsandbytes from repacking the 4-bit layers of `model` for inference; returns how many it has.

    On CPUs with AVX512-BF16 it repacks a weight in the first forward in eval mode without grad, and never unpacks it: no
    gradient flows through the layer from then on, in train mode too, and the base's bytes have changed. Call this before
    the first forward; calling it again does no harm. Goes when tests/base/test_quantized.py passes without it.

    Raises:
        InputError: a layer has been repacked already, which rounded its scales to bfloat16.
    """
    layers = {name: layer for name, layer in model.named_modules() if is_4_bit(layer)}
    for name, layer in layers.items():
        if is_repacked(layer):
            raise InputError(
                f"{name} was repacked by bitsandbytes for inference; load the model again, with qriemann.load_base"
            )
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def set_compute_dtype(layer: Any, dtype: Any) -> None:
    """Makes a 4-bit layer compute in `dtype` instead of the dtype its checkpoint names; tests/base/test_load.py."""
    layer.compute_dtype = dtype
    layer.compute_type_is_set = True
