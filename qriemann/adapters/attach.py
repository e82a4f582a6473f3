"""Puts the LoRA layers of a PEFT model on the fixed-rank manifold, and keeps what they save a plain LoRA adapter."""

from __future__ import annotations

import copy
import functools
import logging
import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qriemann.adapters.layer import FixedRankVariant, delta_weight, lora_factors
from qriemann.base.quantized import protect_quantized_weights
from qriemann.errors import InputError
from qriemann.geometry.parameter import FixedRankParameter, fixed_rank_parameters
from qriemann.geometry.point import FixedRankPoint, point_from_factors, random_orthonormal

logger = logging.getLogger(__name__)

Start = Literal["zero", "offset"]


def attach(
    model: nn.Module, *, start: Start = "offset", alpha: float = 1.0, seed: int | None = None
) -> list[FixedRankParameter]:
    """Makes every LoRA layer of the active adapter a point U S V^T with float32 orthonormal factors, in place.

    Call it when no more casting is to come: under TRL it runs when the trainer creates its optimizer. Layers that are on
    the manifold already are left alone. An adapter that holds something keeps it: X = B A is adopted, and `start` is for
    adapters that are still zero.

    Args:
        model: a PEFT model with a LoRA adapter on linear layers, 4-bit or not.
        start: "offset": random orthonormal bases, S = alpha I, and the same point subtracted as a frozen offset, so that
            the model's function is unchanged while the manifold is nearly flat around the start; the saved adapter has
            rank 2 r. "zero": S = 0; the saved adapter has rank r.
        alpha: the scale of S for "offset", > 0.
        seed: of the random bases; None takes one from torch's global generator.

    Returns:
        The points, in the model's order.

    Raises:
        InputError: no LoRA layer, or one that cannot be trained this way (it is named); nothing is changed then.
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
    report_low_precision(model)
    return points


def check_start(start: str, alpha: float) -> None:
    """Raises InputError for a start that does not exist or a scale that it cannot have."""
    if start not in get_args(Start):
        raise InputError(f"start must be one of {', '.join(map(repr, get_args(Start)))}, got {start!r}")
    if start == "offset" and not 0 < alpha < math.inf:
        raise InputError(f"alpha must be a finite number > 0, got {alpha!r}; for S = 0 use start='zero'")


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer, str]]:
    """Every (name, layer, adapter) to put on the manifold, all checked before any is changed."""
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
            "model must be a PEFT model with a LoRA adapter on at least one linear layer, got none; "
            "call peft.get_peft_model(model, LoraConfig(target_modules='all-linear')) first"
        )
    return found


def _active_adapter(name: str, module: BaseTunerLayer) -> str | None:
    """The one active adapter of a layer that has it, None for a layer without trainable adapters."""
    if not isinstance(module, LoraLayer):
        trainable = any(p.requires_grad for p in module.parameters(recurse=True))
        # Trainable tokens are tuner layers of another kind: AdamW trains them as it does any other parameter.
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
            f"{name} is a LoRA {kind} layer; only linear layers are on the fixed-rank manifold: "
            "leave it out of target_modules"
        )
    rank, (rows, columns) = module.r[adapter], (module.out_features, module.in_features)
    if rank > min(rows, columns):
        raise InputError(
            f"rank must be at most min(out_features, in_features) of every layer, got r={rank} for {name} "
            f"({rows} x {columns}); lower r, or set rank_pattern for this layer"
        )
    factors = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    for other in module.lora_A.keys() - {adapter} if variant is not None else ():
        theirs = module.lora_A[other].weight, module.lora_B[other].weight
        if all(a.shape == b.shape and torch.equal(a.to(b), b) for a, b in zip(factors, theirs, strict=True)):
            raise InputError(
                f"no other adapter may be a copy of the factors of one that is attached, got {other!r} on {name}: U and V "
                "without S are not the adapter (TRL makes its reference of an adapter in this way); save the adapter, and "
                "give the trainer one that PeftModel.from_pretrained(..., is_trainable=True) loads"
            )
    for factor in factors:
        if factor.is_meta or not factor.isfinite().all():
            raise InputError(f"the adapter of {name} must hold finite numbers; it was not loaded, or it is broken")


def _check_offset_can_be_saved(model: nn.Module, layers: list[tuple[str, LoraLayer, str]]) -> None:
    """An offset doubles the rank that is saved, which a config must say, and can say only of all layers."""
    empty = [name for name, layer, adapter in layers if not layer.lora_B[adapter].weight.detach().any()]
    if empty and len(empty) < len(layers):
        raise InputError(
            f"start='offset' needs an adapter that is zero in every layer or in none, got {len(empty)} zero layers of "
            f"{len(layers)} ({empty[0]}, ...); use start='zero'"
        )
    if empty and not _config_owners(model):
        raise InputError(
            f"start='offset' needs the model that holds the adapter's config, got a {type(model).__name__} without "
            "peft_config; pass the whole model, or use start='zero'"
        )


def _attach_layer(
    name: str, module: LoraLayer, adapter: str, start: Start, alpha: float, generator: torch.Generator
) -> FixedRankParameter:
    variant = module.lora_variant.get(adapter)
    if isinstance(variant, FixedRankVariant):
        # A copied model has copied factors, and a parameter's attributes are not copied with it.
        variant.point.mark_factors()
        variant.point.follow()
        return variant.point
    u, v_transposed = module.lora_B[adapter].weight, module.lora_A[adapter].weight
    rank = u.shape[1]
    _take_saved_factors_on_load(module)
    pending = module._fixed_rank_loaded.pop(adapter, None)
    offset = None
    if pending is not None:
        current, frozen = ((b, a) for b, a in pending)
        point = point_from_factors(*current, generator)
        offset = _move(point_from_factors(*frozen, generator), u.device)
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
    for method in (_cast_input_dtype, get_delta_weight):
        setattr(module, method.__name__, functools.partial(method, module))
    module.register_state_dict_post_hook(_fold_core)
    return record


def _cast_input_dtype(module: LoraLayer, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In the place of PEFT's, which keeps a float32 copy of every layer's input alive, because the factors are float32."""
    active = (module.lora_variant.get(name) for name in module.active_adapters)
    if all(getattr(variant, "takes_any_dtype", False) for variant in active):
        return x
    return type(module)._cast_input_dtype(module, x, dtype)  # type: ignore[call-overload]


def get_delta_weight(module: LoraLayer, adapter: str) -> Float[Tensor, "m n"]:
    """In the place of PEFT's, which multiplies the factors and knows of no core."""
    if isinstance(module.lora_variant.get(adapter), FixedRankVariant):
        return delta_weight(module, adapter)
    return type(module).get_delta_weight(module, adapter)  # type: ignore[operator]


def _move(point: FixedRankPoint, device: torch.device) -> FixedRankPoint:
    return FixedRankPoint(*(part.to(device, torch.float32).clone() for part in point))


def _fold_core(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Whatever saves the layer, at any moment, finds plain LoRA factors: B = U S and A = V^T, offset appended."""
    for adapter, variant in module.lora_variant.items():
        key_b, key_a = (f"{prefix}lora_{factor}.{adapter}.weight" for factor in "BA")
        if not isinstance(variant, FixedRankVariant) or key_b not in state_dict:
            continue
        b, a = lora_factors(variant.point)
        if variant.point.offset is not None and module.use_rslora[adapter]:
            # The saved r and lora_alpha are doubled; alpha / sqrt(r) grows by sqrt(2) where alpha / r stays.
            b = b / math.sqrt(2)
            if (key_bias := f"{prefix}lora_B.{adapter}.bias") in state_dict:
                state_dict[key_bias] = state_dict[key_bias] / math.sqrt(2)
        state_dict[key_b], state_dict[key_a] = b.contiguous(), a.contiguous()


def describe_saved_rank(model: nn.Module, points: list[FixedRankParameter]) -> None:
    """Doubles r and lora_alpha in the configs that are saved with `points` while their saved factors have twice the rank."""
    own = {id(point) for point in points}
    for owner in _config_owners(model):
        with_offset: dict[str, bool] = {}
        for module in owner.modules():
            for adapter, variant in getattr(module, "lora_variant", {}).items():
                if adapter in owner.peft_config and isinstance(variant, FixedRankVariant) and id(variant.point) in own:
                    with_offset[adapter] = with_offset.get(adapter, False) or variant.point.offset is not None
        for adapter, doubled in with_offset.items():
            _set_saved_rank(owner, adapter, doubled=doubled)


@torch.no_grad()
def truncate_(model: nn.Module) -> dict[str, float]:
    """Truncates every point with an offset to X_r, the best approximation of X - X_0 of rank r, without offset, in place.

    What is saved then has rank r instead of 2 r. Call it after the last step: the momentum belongs to the point before.

    Returns:
        ||X - X_0 - X_r|| / ||X - X_0|| in the Frobenius norm, by layer; 0 for a point without offset, which stays as it is.

    Raises:
        InputError: the model has no adapter on the manifold.
    """
    points = fixed_rank_parameters(model.parameters())
    if not points:
        raise InputError(
            "model must have an adapter on the fixed-rank manifold, got none; call qriemann.attach(model) first"
        )
    errors = dict.fromkeys((point.name for point in points), 0.0)
    for point in points:
        if point.offset is None:
            continue
        b, a = (factor.double().cpu() for factor in lora_factors(point))
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        left, sigma, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        kept = slice(point.rank)
        truncated = FixedRankPoint(q_b @ left[:, kept], torch.diag(sigma[kept]), q_a @ right[kept].mT)
        point.assign(_move(truncated, point.u.device))
        point.offset = None
        errors[point.name] = (sigma[point.rank :].norm() / sigma.norm().clamp_min(1e-300)).item()
    describe_saved_rank(model, points)
    return errors


def _config_owners(model: nn.Module) -> list[Any]:
    """The modules whose `peft_config` says what is saved: a PeftModel's base, or one that an adapter was injected into."""
    # A PeftModel, its tuner and its base share one dict; the base is the last of them, wherever the walk starts.
    owners = {id(m.peft_config): m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)}
    return list(owners.values())


def _set_saved_rank(owner: Any, adapter: str, *, doubled: bool) -> None:
    # By adapter: the config with twice the rank, and the one that it stands for.
    kept = owner.__dict__.setdefault("_qriemann_doubled_configs", {})
    config = owner.peft_config[adapter]
    is_doubled = adapter in kept and kept[adapter][0] is config
    if doubled and not is_doubled:
        # A copy, because the user's own LoraConfig may make more models, and other adapters may share it (DPO's reference).
        twice = copy.deepcopy(config)
        twice.r, twice.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        twice.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
        twice.alpha_pattern = {key: 2 * alpha for key, alpha in (config.alpha_pattern or {}).items()}
        kept[adapter], owner.peft_config[adapter] = (twice, config), twice
    elif is_doubled and not doubled:
        owner.peft_config[adapter] = kept.pop(adapter)[1]


def report_low_precision(model: nn.Module) -> None:
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


def accept_offset_checkpoints(model: nn.Module) -> None:
    """Lets a not yet attached model load an adapter saved with an offset (rank 2 r into layers of rank r).

    The trainer loads a checkpoint's adapter before it creates the optimizer. The two halves are kept aside until `attach`
    turns them into the point and its offset.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _take_saved_factors_on_load(module)


def _take_saved_factors_on_load(module: LoraLayer) -> None:
    if not hasattr(module, "_fixed_rank_loaded"):
        module._fixed_rank_loaded = {}
        module.register_load_state_dict_pre_hook(_take_saved_factors)


def _take_saved_factors(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """The counterpart of `_fold_core`: plain factors that are loaded become the point, and its offset if they have one."""
    for adapter, rank in module.r.items():
        key_b, key_a = (f"{prefix}lora_{factor}.{adapter}.weight" for factor in "BA")
        if key_b not in state_dict or key_a not in state_dict:
            continue
        variant = module.lora_variant.get(adapter)
        attached = isinstance(variant, FixedRankVariant)
        b, a = state_dict[key_b].float(), state_dict[key_a].float()
        with_offset = b.shape[1] == 2 * rank
        if attached and b.shape[1] != (rank if variant.point.offset is None else 2 * rank):
            raise InputError(
                f"an adapter must be loaded into one with the same start, got rank {b.shape[1]} for {prefix[:-1]}, which "
                f"has rank {rank} and {'no' if variant.point.offset is None else 'an'} offset; load it into a fresh model"
            )
        if not attached and not with_offset:
            continue
        if with_offset and module.use_rslora[adapter]:
            b = b * math.sqrt(2)
            if (key_bias := f"{prefix}lora_B.{adapter}.bias") in state_dict:
                state_dict[key_bias] = state_dict[key_bias] * math.sqrt(2)
        current, frozen = (b[:, :rank], a[:rank]), (-b[:, rank:], a[rank:])
        if attached:
            generator = torch.Generator().manual_seed(0)
            device = variant.point.u.device
            variant.point.assign(_move(point_from_factors(*current, generator), device))
            if with_offset:
                variant.point.offset = _move(point_from_factors(*frozen, generator), device)
        else:
            module._fixed_rank_loaded[adapter] = (current, frozen)
        # What is left for PEFT to load has the shapes it expects.
        module_b, module_a = module.lora_B[adapter].weight, module.lora_A[adapter].weight
        state_dict[key_b], state_dict[key_a] = module_b.detach().clone(), module_a.detach().clone()
