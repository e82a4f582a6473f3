"""Puts the LoRA layers of a PEFT model on the fixed-rank manifold, and keeps what they save a plain LoRA adapter."""

import functools
import logging
import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qriemann.adapters.detach import refuse_other_use_of_factors
from qriemann.adapters.layer import FixedRankVariant, delta_weight, lora_factors
from qriemann.adapters.lora_layers import lora_layers
from qriemann.adapters.saved_rank import config_owners, describe_saved_rank
from qriemann.adapters.spectrum import factored_svd
from qriemann.base.load import load_model
from qriemann.errors import InputError
from qriemann.geometry.parameter import FixedRankParameter, fixed_rank_parameters
from qriemann.geometry.point import FixedRankPoint, point_from_factors, random_orthonormal
from qriemann.upstream import protect_quantized_weights
from qriemann.upstream.tuners import keep_input_dtype

logger = logging.getLogger(__name__)

Start = Literal["zero", "offset"]


def attach(
    model: nn.Module, *, start: Start = "zero", alpha: float = 1.0, seed: int | None = None
) -> list[FixedRankParameter]:
    """Makes every LoRA layer of the active adapter a point U S V^T with float32 orthonormal factors, in place.

    Call it after the last cast of the model: under TRL that is when the trainer creates its optimizer. Layers that are on
    the manifold already stay as they are. An adapter that is not zero keeps its X = B A; `start` applies to one that is.
    PEFT's own methods work on attached layers; `detach` makes them plain for other code that uses the factors.

    Args:
        model: a PEFT model with a LoRA adapter on linear layers, 4-bit or not.
        start: "zero": random orthonormal bases, S = 0; the saved adapter has rank r. "offset": S = alpha I, and the same
            point subtracted as a frozen offset, so that the model's function is unchanged and the manifold is nearly flat
            around the start; the saved adapter has rank 2 r.
        alpha: the scale of S for "offset", > 0.
        seed: of the random bases; None takes one from torch's global generator.

    Returns:
        The points, in the model's order.

    Raises:
        InputError: there is no LoRA layer, or one cannot be trained this way (it is named); the model is unchanged.
    """
    check_start(start, alpha)
    layers = lora_layers(model)
    if start == "offset":
        _check_offset_can_be_saved(model, layers)
    protect_quantized_weights(model)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    points = [_attach_layer(name, layer, adapter, start, alpha, generator) for name, layer, adapter in layers]
    describe_saved_rank(model, points)
    refuse_other_use_of_factors()
    report_low_precision(model)
    return points


def check_start(start: str, alpha: float) -> None:
    """Raises InputError for an unknown start or an invalid scale."""
    if start not in get_args(Start):
        raise InputError(f"start must be one of {', '.join(map(repr, get_args(Start)))}, got {start!r}")
    if start == "offset" and not 0 < alpha < math.inf:
        raise InputError(f"alpha must be a finite number > 0, got {alpha!r}; for S = 0 use start='zero'")


def _check_offset_can_be_saved(model: nn.Module, layers: list[tuple[str, LoraLayer, str]]) -> None:
    """Raises InputError unless the doubled rank that an offset saves can be written into the adapter's config."""
    empty = [name for name, layer, adapter in layers if not layer.lora_B[adapter].weight.detach().any()]
    if empty and len(empty) < len(layers):
        raise InputError(
            f"start='offset' needs an adapter that is zero in every layer or in none; {len(empty)} of {len(layers)} are zero"
        )
    if empty and not config_owners(model):
        raise InputError(
            f"start='offset' needs the model that holds the adapter's config; a {type(model).__name__} has none"
        )


def _attach_layer(
    name: str, module: LoraLayer, adapter: str, start: Start, alpha: float, generator: torch.Generator
) -> FixedRankParameter:
    variant = module.lora_variant.get(adapter)
    if isinstance(variant, FixedRankVariant):
        # Copying a model copies its factors but not the attributes of a parameter.
        variant.point.mark_factors()
        variant.point.follow()
        return variant.point
    u, v_transposed = module.lora_B[adapter].weight, module.lora_A[adapter].weight
    rank = u.shape[1]
    _take_saved_factors_on_load(module)
    pending = module._fixed_rank_loaded.pop(adapter, None)
    offset = None
    if pending is not None:
        point, offset = (_move(part, u.device) for part in pending)
    elif start == "offset" and not u.detach().any():
        point = FixedRankPoint(
            random_orthonormal(module.out_features, rank, generator),
            alpha * torch.eye(rank),
            random_orthonormal(module.in_features, rank, generator),
        )
        offset = _move(point, u.device)
    else:
        point = point_from_factors(u.detach(), v_transposed.detach(), generator)
    record = FixedRankParameter(
        name, u, v_transposed, torch.zeros(rank, rank, dtype=torch.float32, device=u.device), offset
    )
    record.assign(_move(point, u.device))
    module.lora_variant[adapter] = FixedRankVariant(record)
    keep_input_dtype(module)
    module.get_delta_weight = functools.partial(get_delta_weight, module)  # type: ignore[operator]
    return record


def get_delta_weight(module: LoraLayer, adapter: str) -> Float[Tensor, "m n"]:
    """Replaces PEFT's method, which multiplies the factors without the core."""
    if isinstance(module.lora_variant.get(adapter), FixedRankVariant):
        return delta_weight(module, adapter)
    return type(module).get_delta_weight(module, adapter)  # type: ignore[operator]


def _move(point: FixedRankPoint, device: torch.device) -> FixedRankPoint:
    return FixedRankPoint(*(part.to(device, torch.float32).clone() for part in point))


def _fold_core(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Puts plain LoRA factors into every state dict of the layer: B = U S and A = V^T, the offset's appended."""
    for adapter, variant in module.lora_variant.items():
        key_b, key_a = (f"{prefix}lora_{factor}.{adapter}.weight" for factor in "BA")
        if not isinstance(variant, FixedRankVariant) or key_b not in state_dict:
            continue
        b, a = lora_factors(variant.point)
        if variant.point.offset is not None and module.use_rslora[adapter]:
            # With r and lora_alpha doubled, alpha / sqrt(r) grows by sqrt(2), where alpha / r stays the same.
            b = b / math.sqrt(2)
            if (key_bias := f"{prefix}lora_B.{adapter}.bias") in state_dict:
                state_dict[key_bias] = state_dict[key_bias] / math.sqrt(2)
        state_dict[key_b], state_dict[key_a] = b.contiguous(), a.contiguous()


@torch.no_grad()
def truncate_(model: nn.Module) -> dict[str, float]:
    """Replaces every point with an offset by X_r, the best approximation of X - X_0 of rank r, without offset, in place.

    The saved adapter then has rank r instead of 2 r. Call it after the last step: the momentum belongs to the old point.

    Returns:
        ||X - X_0 - X_r|| / ||X - X_0|| in the Frobenius norm, by layer; 0 for a point without offset, which is unchanged.

    Raises:
        InputError: the model has no adapter on the manifold.
    """
    points = fixed_rank_parameters(model.parameters())
    if not points:
        raise InputError("model has no adapter on the fixed-rank manifold; call qriemann.attach(model) first")
    errors = dict.fromkeys((point.name for point in points), 0.0)
    for point in points:
        if point.offset is None:
            continue
        u, sigma, v = factored_svd(*(factor.cpu() for factor in lora_factors(point)))
        kept = slice(point.rank)
        truncated = FixedRankPoint(u[:, kept], torch.diag(sigma[kept]), v[:, kept])
        point.assign(_move(truncated, point.u.device))
        point.offset = None
        errors[point.name] = (sigma[point.rank :].norm() / sigma.norm().clamp_min(1e-300)).item()
    describe_saved_rank(model, points)
    return errors


def report_low_precision(model: nn.Module) -> None:
    """Warns of trainable tensors outside the adapters that are not float32."""
    low = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not hasattr(parameter, "fixed_rank") and parameter.dtype != torch.float32
    ]
    if low:
        logger.warning(
            "%d trainable tensors outside the adapters (%s, ...) are trained by AdamW in %s, as the trainer left them",
            len(low),
            low[0],
            model.get_parameter(low[0]).dtype,
        )


@functools.wraps(load_model, assigned=("__doc__", "__annotations__"))
def load_base(*args: Any, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = load_model(*args, **options)
    # A trainer can then resume an adapter on this base from a checkpoint with an offset.
    model.register_load_state_dict_pre_hook(accept_offset_checkpoints)
    return model, tokenizer


def accept_offset_checkpoints(model: nn.Module, *_: Any) -> None:
    """Lets a model that is not yet attached load an adapter saved with an offset (rank 2 r into layers of rank r).

    A trainer loads a checkpoint's adapter before it creates the optimizer. The layers keep both halves until `attach` turns
    them into the point and its offset.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _take_saved_factors_on_load(module)


def _take_saved_factors_on_load(module: LoraLayer) -> None:
    if not hasattr(module, "_fixed_rank_loaded"):
        module.register_load_state_dict_pre_hook(_take_saved_factors)
        module.register_state_dict_post_hook(_fold_core)
        module._fixed_rank_loaded = None
    if module._fixed_rank_loaded is None:
        module._fixed_rank_loaded = {}


def _take_saved_factors(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """The inverse of `_fold_core`: turns loaded plain factors into the point and, at twice the rank, its offset."""
    # None after `detach`: what is loaded then is what the layer has.
    for adapter, rank in {} if module._fixed_rank_loaded is None else module.r.items():
        key_b, key_a = (f"{prefix}lora_{factor}.{adapter}.weight" for factor in "BA")
        if key_b not in state_dict or key_a not in state_dict:
            continue
        variant = module.lora_variant.get(adapter)
        attached = isinstance(variant, FixedRankVariant)
        b, a = state_dict[key_b].float(), state_dict[key_a].float()
        with_offset = b.shape[1] == 2 * rank
        if attached and b.shape[1] != (rank if variant.point.offset is None else 2 * rank):
            raise InputError(
                f"{prefix[:-1]} has another start than the adapter of rank {b.shape[1]}; load it into a fresh model"
            )
        if not attached and not with_offset:
            continue
        if with_offset and module.use_rslora[adapter]:
            b = b * math.sqrt(2)
            if (key_bias := f"{prefix}lora_B.{adapter}.bias") in state_dict:
                state_dict[key_bias] = state_dict[key_bias] * math.sqrt(2)
        generator = torch.Generator().manual_seed(0)
        point = point_from_factors(b[:, :rank], a[:rank], generator)
        offset = point_from_factors(-b[:, rank:], a[rank:], generator) if with_offset else None
        if attached:
            variant.point.assign(_move(point, variant.point.u.device))
            variant.point.offset = offset and _move(offset, variant.point.u.device)
        else:
            module._fixed_rank_loaded[adapter] = (point, offset)
        # PEFT then loads the layer's own factors, which have the shapes that it expects.
        module_b, module_a = module.lora_B[adapter].weight, module.lora_A[adapter].weight
        state_dict[key_b], state_dict[key_a] = module_b.detach().clone(), module_a.detach().clone()
