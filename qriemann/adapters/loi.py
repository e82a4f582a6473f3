"""Locally optimal initialization: a start whose tangent space contains the gradient's leading singular directions.

[R25] Bogachev et al., "RiemannLoRA / Riemannion: a unified Riemannian framework for LoRA", arXiv 2507.12142.
"""

import numbers
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qriemann.adapters.attach import Start, attach, check_start
from qriemann.adapters.gradient import GradientSVD, Layers, gradient_svd
from qriemann.adapters.layer import FixedRankVariant
from qriemann.adapters.lora_layers import lora_layers
from qriemann.adapters.saved_rank import describe_saved_rank
from qriemann.errors import InputError
from qriemann.geometry.parameter import FixedRankParameter
from qriemann.geometry.point import FixedRankPoint
from qriemann.upstream import protect_quantized_weights


def locally_optimal_(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    start: Start = "offset",
    alpha: float = 1.0,
    oversampling: int = 16,
    power_iterations: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[FixedRankParameter]:
    """Moves every LoRA layer of the active adapter to the locally optimal point of the loss, in place.

    With the gradient G = sum_i sigma_i u_i v_i^T at the base model, the bases are

    - "offset": U = [u_1 .. u_r], V = [v_{r+1} .. v_2r]. The tangent space contains the best approximation of G of rank
      2 r [R25]. S = alpha I, and the same point is subtracted as a frozen offset: the model's function is unchanged. The
      sign of alpha does not matter, because the signs of the u_i and v_j are unrelated.
    - "zero": S = 0 with U = [u_1 .. u_r], V = [v_1 .. v_r]. The tangent space contains the best approximation of G of rank
      r. With the V above, the first retraction would drop it: a step from S = 0 has rank 2 r and is cut to r.

    An adapter that is not on the manifold yet is put there. The base, random generators, `.grad` and train or eval modes are
    unchanged afterwards; so is everything after an error.

    Args:
        model: a PEFT model whose adapter is still zero.
        batches: a few training batches; all are kept in memory and read 2 (power_iterations + 1) times.
        loss_fn: called with (model, batch); None takes the loss that `model(**batch)` returns.
        start: "offset" or "zero", as above.
        alpha: the scale of S for "offset", > 0; 0.3, 1 and 3 train alike (recipes/results/starts).
        oversampling: columns beyond 2 r, >= 0.
        power_iterations: q, >= 0.
        seed: of the random sketch.
        progress: called after each batch with the batches done and the batches to do in all passes.

    Returns:
        The points, in the model's order.

    Raises:
        InputError: a value out of range, no batch, a loss or gradient that is not finite, or an adapter that is not zero.

    Cost: 2 (power_iterations + 1) forward and backward passes over the batches. A layer keeps two float32 blocks of
    2 r + oversampling columns and, as in training, its input. Dropout is off; gradient checkpointing stays on. Gradients
    are summed over processes.
    """
    check_options(start, alpha, oversampling, power_iterations, seed)
    layers = lora_layers(model)
    _check_zero(layers)
    protect_quantized_weights(model)
    with preserved_rng():
        if not isinstance(batches, Iterable):
            raise InputError(f"batches must be an iterable of training batches, got {batches!r}")
        drawn = list(batches)
        if not drawn:
            raise InputError("batches must hold at least one batch, got none; check the dataset and its split")
        gradients = gradient_svd(
            model,
            layers,
            drawn,
            loss_fn or own_loss,
            oversampling=oversampling,
            power_iterations=power_iterations,
            seed=seed,
            progress=progress,
        )
    points = attach(model, start=start, alpha=alpha, seed=seed)
    for point, gradient in zip(points, gradients, strict=True):
        _set(point, gradient, start, alpha)
    describe_saved_rank(model, points)
    return points


def check_options(start: str, alpha: float, oversampling: int, power_iterations: int, seed: int) -> None:
    """Raises InputError for an option out of range."""
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise InputError(f"alpha must be a number, got {alpha!r}")
    check_start(start, alpha)
    for key, value in (("oversampling", oversampling), ("power_iterations", power_iterations), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{key} must be an integer >= 0, got {value!r}")


def _check_zero(layers: Layers) -> None:
    for name, layer, adapter in layers:
        variant, bias = layer.lora_variant.get(adapter), layer.lora_B[adapter].bias
        if not isinstance(variant, FixedRankVariant):
            zero = not layer.lora_B[adapter].weight.any()
        elif variant.point.offset is None:
            zero = not variant.point.s.any()
        else:
            zero = all(map(torch.equal, variant.point.point(), variant.point.offset))
        if not zero or (bias is not None and bias.any()):
            raise InputError(
                f"the adapter must still be zero to be initialized, and {name} is not; initialize before the first step"
            )


def _set(point: FixedRankParameter, gradient: GradientSVD, start: Start, alpha: float) -> None:
    rank = point.rank
    # A layer that the loss does not reach keeps its random bases; a warning named it.
    u, v = point.point().u, point.point().v
    if gradient.sigma[0] > 0:
        # A small layer has fewer than 2 r columns; then the last r of them.
        last = rank if start == "zero" else min(2 * rank, len(gradient.sigma))
        u, v = gradient.u[:, :rank], gradient.v[:, last - rank : last]
    core = torch.eye(rank, device=u.device) * (alpha if start == "offset" else 0.0)
    point.assign(FixedRankPoint(u, core, v))
    point.offset = FixedRankPoint(*(part.clone() for part in point.point())) if start == "offset" else None


def own_loss(model: Any, batch: Any) -> Tensor:
    """The loss that `model(**batch)` returns; InputError where it returns none."""
    loss = getattr(model(**batch), "loss", None) if isinstance(batch, Mapping) else None
    if loss is None:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(f"batches must hold labels, so that the model returns its loss, got {got}; or pass loss_fn")
    return loss


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores the random generators of Python, NumPy and torch after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    # All devices are named, because torch warns when it has to choose among several.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
