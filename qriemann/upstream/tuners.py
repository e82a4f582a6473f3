"""Private parts of PEFT."""

import functools
import importlib
from collections.abc import Callable
from typing import Any


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

    `add_weighted_adapter` and hot-swapping use the factors of a layer and know nothing of a variant.
    tests/adapters/test_peft_methods.py
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


def names_of_experts(model: Any) -> frozenset[str]:
    """Names of layers that PEFT takes for the fused experts of this kind of model, even where a linear layer has the name.

    Their adapters would sit on three-dimensional parameters and take no dropout; tests/adapters/test_experts.py
    """
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    kind = _MODEL_TO_CONVERSION_PATTERN.get(getattr(getattr(model, "config", None), "model_type", None))
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(kind, ()))
