"""Ordinary LoRA adapters, prepared for an optimizer over their factors."""

import torch
from torch import nn

from qriemann.adapters.attach import report_low_precision
from qriemann.errors import InputError
from qriemann.upstream import protect_quantized_weights


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every trainable parameter of `model` with its name."""
    for name, module in model.named_modules():
        if getattr(module, "_fixed_rank_loaded", None):
            raise InputError(
                f"{name} was saved with an offset, which plain LoRA has no place for; resume with the method that saved it"
            )
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def prepare_plain(model: nn.Module) -> None:
    """Makes the trainable parameters of LoRA adapters float32, in place.

    Call it after the last cast of the model: TRL's trainers cast the adapter of a 4-bit model to bf16 in their constructor,
    and in bf16 a step of 1e-4 is lost beside a factor of 1e-2.
    """
    protect_quantized_weights(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" in name:
            parameter.data = parameter.data.to(torch.float32)
    report_low_precision(model)
