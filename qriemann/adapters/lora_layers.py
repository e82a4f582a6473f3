"""The LoRA layers of a PEFT model that can be put on the manifold, each checked before any is changed."""

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qriemann.adapters.layer import FixedRankVariant
from qriemann.errors import InputError


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer, str]]:
    """Name, layer and adapter of every layer to put on the manifold."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        adapter = _active_adapter(name, module)
        if adapter is None:
            continue
        _check_layer(name, module, adapter)
        found.append((name, module, adapter))
    if not found:
        raise InputError(
            "model must have a LoRA adapter on a linear layer; call peft.get_peft_model(model, LoraConfig(...)) first"
        )
    return found


def _active_adapter(name: str, module: BaseTunerLayer) -> str | None:
    """The one active adapter of a layer that has it, None for a layer without trainable adapters."""
    if not isinstance(module, LoraLayer):
        trainable = any(p.requires_grad for p in module.parameters(recurse=True))
        # Trainable tokens are tuner layers of another kind: AdamW trains them like any other parameter.
        if trainable and type(module).__name__ != "TrainableTokensLayer":
            raise InputError(f"{name} is a {type(module).__name__}; only LoRA adapters are on the fixed-rank manifold")
        return None
    present = [a for a in module.active_adapters if a in {**module.lora_A, **module.lora_embedding_A}]
    if len(present) > 1:
        raise InputError(f"one adapter must be active, got {present} on {name}; call model.set_adapter(name)")
    return present[0] if present else None


def _check_layer(name: str, module: LoraLayer, adapter: str) -> None:
    variant = module.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, FixedRankVariant):
        kind = type(variant).__name__.removesuffix("LinearVariant").removesuffix("Variant")
        raise InputError(f"{name} uses {kind}, which is not a point of the fixed-rank manifold; use plain LoRA")
    kind = type(module).__name__
    if adapter not in module.lora_A or not (isinstance(module, Linear) or kind in ("Linear4bit", "Linear8bitLt")):
        raise InputError(
            f"{name} is a LoRA {kind} layer; only linear layers are on the manifold: leave it out of target_modules"
        )
    check_rank(name, module.r[adapter], module.out_features, module.in_features)
    factors = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    for other in module.lora_A.keys() - {adapter} if variant is not None else ():
        theirs = module.lora_A[other].weight, module.lora_B[other].weight
        if all(a.shape == b.shape and torch.equal(a.to(b), b) for a, b in zip(factors, theirs, strict=True)):
            raise InputError(
                f"adapter {other!r} copies the factors of an attached one on {name} (as TRL makes its reference), and U and "
                "V alone are not the adapter; save it, and train what PeftModel.from_pretrained(..., is_trainable=True) loads"
            )
    for factor in factors:
        if factor.is_meta or not factor.isfinite().all():
            raise InputError(f"the adapter of {name} must hold finite numbers; load it again, it is missing or broken")


def check_rank(name: str, rank: int, rows: int, columns: int) -> None:
    """Raises InputError for a rank that a matrix of that shape cannot have."""
    if rank > min(rows, columns):
        raise InputError(
            f"the rank must be at most {min(rows, columns)} for {name} ({rows} x {columns}), got {rank}; see rank_pattern"
        )
