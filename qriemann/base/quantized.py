"""4-bit layers of bitsandbytes, kept in the format that they can be trained through."""

import torch

from qriemann.errors import InputError
from qriemann.upstream import is_4_bit, is_repacked, keep_unpacked


def protect_quantized_weights(model: torch.nn.Module) -> int:
    """Keeps bitsandbytes from repacking the 4-bit layers of `model` for inference; returns how many it has.

    Call it before the first forward; calling it again does no harm. See `qriemann.upstream.keep_unpacked`.

    Raises:
        InputError: a layer has been repacked already. That rounded its scales to bfloat16, so the model must be loaded again.
    """
    count = 0
    for layer_name, layer in model.named_modules():
        if not is_4_bit(layer):
            continue
        if is_repacked(layer):
            raise InputError(
                f"{layer_name} was repacked by bitsandbytes for inference; load the model again, with qriemann.load_base"
            )
        keep_unpacked(layer)
        count += 1
    return count
