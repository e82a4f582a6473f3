"""Private parts of PEFT."""

import functools
from collections.abc import Callable
from typing import Any

# PEFT calls LoraVariant private: it replaces the forward of any LoRA layer, 4-bit or not, without a subclass. The other
# is how PEFT matches layers with the names in a configuration. tests/adapters/test_layer.py and test_experts.py.
from peft.tuners.lora.layer import LoraVariant as LoraVariant
from peft.tuners.lora.model import LoraModel
from peft.utils import hotswap
from peft.utils.other import get_pattern_key as get_pattern_key


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


def replace_peft_functions(wrap: Callable[[Any, str], Any]) -> None:
    """Puts what `wrap` makes of a function and its name in the place of PEFT's that use the factors themselves, once.

    They know nothing of a variant. tests/adapters/test_peft_methods.py
    """
    # The inner ones, where a script may have imported the outer ones before.
    for owner, name, known_as in (
        (LoraModel, "add_weighted_adapter", "add_weighted_adapter"),
        (hotswap, "hotswap_adapter_from_state_dict", "hotswap_adapter"),
        (hotswap, "_convert_scalings_to_tensor", "prepare_model_for_compiled_hotswap"),
    ):
        function = getattr(owner, name)
        if not hasattr(function, "takes_attached_layers"):
            replacement = wrap(function, known_as)
            replacement.takes_attached_layers = True
            setattr(owner, name, replacement)


def names_of_experts(model: Any) -> frozenset[str]:
    """Names of layers that PEFT takes for the fused experts of this kind of model, even where a linear layer has the name.

    Their adapters would sit on three-dimensional parameters and take no dropout; tests/adapters/test_experts.py
    """
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    kind = _MODEL_TO_CONVERSION_PATTERN.get(getattr(getattr(model, "config", None), "model_type", None))
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(kind, ()))
