"""4-bit layers of bitsandbytes, kept in the format that they can be trained through."""

import torch

from qriemann.errors import InputError


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
