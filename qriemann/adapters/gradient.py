"""The leading singular vectors of the gradient G = dL/dX in every adapted layer, without ever forming it.

A tap replaces a layer's adapter: it passes the layer's output through and computes G V or G^T U in its backward, for a basis
of any width. So one pass over the batches applies G or its transpose in all layers at once, and 2 (q + 1) passes are a
randomized SVD with q power iterations. The bases of the last two are kept together, a block Krylov space [MM15].

[H11] Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), Algorithms 4.4 and 5.1.
[MM15] Musco, Musco, "Randomized block Krylov methods for stronger and faster approximate SVD", NeurIPS 2015.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qriemann.adapters.layer import float32_product
from qriemann.device import LOSS_SCALE
from qriemann.errors import InputError
from qriemann.upstream.tuners import LoraVariant

logger = logging.getLogger(__name__)

Layers = Sequence[tuple[str, LoraLayer, str]]

# An earlier direction is used if its part outside the later basis is this long: rounding errors are divided by the length.
_NEAR = 0.1


class GradientSVD(NamedTuple):
    """Leading singular triplets of one layer's gradient.

    Attributes:
        u: (m, k), orthonormal columns; k is 2 r, or min(m, n) where that is less.
        sigma: (k,), descending, up to a factor that all layers share; zero in a layer that the loss does not reach.
        v: (n, k), orthonormal columns.
    """

    u: Float[Tensor, "m k"]
    sigma: Float[Tensor, " k"]
    v: Float[Tensor, "n k"]


def gradient_svd(
    model: nn.Module,
    layers: Layers,
    batches: Sequence[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    oversampling: int,
    power_iterations: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[GradientSVD]:
    """The leading singular triplets of each layer's gradient at the base model, summed over the batches.

    The adapter is ignored, as if it were zero. Modes, `.grad` and the layers' variants are restored; random generators are
    not. For the arguments see `locally_optimal_`; `layers` come from `lora_layers`.
    """
    taps = _make_taps(layers, oversampling, torch.Generator().manual_seed(seed))
    passes = 2 * (power_iterations + 1)
    done = itertools.count(1)

    def report() -> None:
        if progress is not None:
            progress(next(done), passes * len(batches))

    with _tapped(layers, taps), probing(model), torch.enable_grad():
        _read(model, batches, loss_fn, seed, report)
        for _ in range(passes - 1):
            for tap in taps:
                tap.turn()
            _read(model, batches, loss_fn, seed, report)
    taps.reverse()
    # Popping frees each tap's blocks once they are decomposed.
    found = [taps.pop().decompose(2 * layer.r[adapter]) for _, layer, adapter in layers]
    unreached = [name for (name, *_), triplets in zip(layers, found, strict=True) if not triplets.sigma[0] > 0]
    if len(unreached) == len(found):
        raise InputError(
            f"the loss has no gradient in any of {len(found)} adapted layers; is the adapter merged, or every label masked?"
        )
    if unreached:
        logger.warning("%d layers have no gradient and start at random bases (%s, ...)", len(unreached), unreached[0])
    return found


def _make_taps(layers: Layers, oversampling: int, generator: torch.Generator) -> "list[_GradientTap]":
    taps, narrow = [], []
    for name, layer, adapter in layers:
        rows, columns, wanted = layer.out_features, layer.in_features, 2 * layer.r[adapter] + oversampling
        if wanted > min(rows, columns):
            narrow.append(f"{name}, {rows} x {columns}")
        # Drawn on the CPU, so that the sketch does not depend on the device.
        sketch = torch.randn(columns, min(wanted, rows, columns), generator=generator)
        taps.append(_GradientTap(name, rows, columns, sketch.to(layer.lora_A[adapter].weight.device)))
    if narrow:
        logger.warning(
            "oversampling %d is cut to the columns there are in %d layers (%s, ...)",
            oversampling,
            len(narrow),
            narrow[0],
        )
    return taps


def _read(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    seed: int,
    report: Callable[[], None],
) -> None:
    """One pass: forward and backward over all batches."""
    device = next(model.parameters()).device
    for index, batch in enumerate(batches):
        # Every pass must see the same gradients, so random operations in the model are seeded.
        torch.manual_seed(seed + index)
        loss = loss_fn(model, send_to_device(batch, device))
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"{list(loss.shape)}, requires_grad {loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
            raise InputError(
                f"the loss must be one number with a gradient, got {got}; is the adapter merged or disabled?"
            )
        if not loss.isfinite().all():
            raise InputError(
                f"the loss must be finite at the start, got {loss.item()} in batch {index + 1} of {len(batches)}"
            )
        (loss.sum() * LOSS_SCALE).backward()
        report()


class _GradientTap(LoraVariant):
    """Replaces a layer's adapter by zero: the output is the base's, and backward computes G V or G^T U.

    Unlike `FixedRankVariant` it keeps no product with the basis for each token, so a wide basis costs no activations.
    """

    takes_any_dtype = True

    def __init__(self, name: str, rows: int, columns: int, sketch: Float[Tensor, "n k"]) -> None:
        self._name, self._heights = name, (rows, columns)
        self._transposed = True
        self._earlier: tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]] | None = None
        self._aim(sketch)

    def _aim(self, basis: Float[Tensor, "_ k"]) -> None:
        """Takes the next basis: V and U in turn."""
        self._transposed = not self._transposed
        self.basis = basis
        # Its gradient will be the product; it occupies one number itself.
        anchor = torch.zeros((), device=basis.device).expand(self._heights[self._transposed], basis.shape[1])
        self._anchor = anchor.requires_grad_()

    def turn(self) -> None:
        """Takes the range of the product as the next basis."""
        product = self._product()
        if self._transposed:
            # In host memory, so that the GPU's peak does not grow.
            self._earlier = self.basis.cpu(), product.float().cpu()
        # Without QR all columns would converge to the first singular vector. [H11, Algorithm 4.4]
        self._aim(torch.linalg.qr(product)[0].float())

    def decompose(self, columns: int) -> GradientSVD:
        """The leading singular triplets of Q Q^T G from G^T Q, where Q spans the basis and the earlier one. [H11, 5.1]"""
        basis, product = self.basis.double(), self._product()
        if self._earlier is not None:
            q, z = (block.to(basis.device, torch.float64) for block in self._earlier)
            overlap = basis.mT @ q
            left, r = torch.linalg.qr(q - basis @ overlap)
            turn, sigma, right = torch.linalg.svd(r)
            new = sigma > _NEAR
            basis = torch.cat([basis, left @ turn[:, new]], 1)
            product = torch.cat([product, (z - product @ overlap) @ right[new].mT / sigma[new]], 1)
        q, r = torch.linalg.qr(product)
        left, sigma, right = torch.linalg.svd(r.mT, full_matrices=False)
        u, v = basis @ left[:, :columns], q @ right[:columns].mT
        return GradientSVD(u.float(), sigma[:columns].float(), v.float())

    def _product(self) -> Float[Tensor, "_ k"]:
        """G V or G^T U, summed over batches and processes, in float64."""
        total = self._anchor.new_zeros(self._anchor.shape) if self._anchor.grad is None else self._anchor.grad
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        if not total.isfinite().all():
            raise InputError(f"the gradient is not finite at the start, in {self._name}; check the compute dtype")
        return total.double()

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The base layer's result."""
        tap = module.lora_variant[active_adapter]
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else result.dtype
        return _TappedOutput.apply(result, x, tap.basis, tap._anchor, tap._transposed, dtype)


class _TappedOutput(torch.autograd.Function):
    """y, with G V or G^T U as the gradient of the anchor."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Float[Tensor, "*tokens m"],
        x: Float[Tensor, "*tokens n"],
        basis: Float[Tensor, "_ k"],
        anchor: Float[Tensor, "_ k"],
        transposed: bool,
        dtype: torch.dtype,
    ) -> Float[Tensor, "*tokens m"]:
        ctx.save_for_backward(x, basis)
        ctx.transposed, ctx.dtype = transposed, dtype
        # Not y itself: autograd refuses models that change it in place.
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad_y: Float[Tensor, "*tokens m"]) -> tuple[Tensor | None, ...]:
        x, basis = (tensor.to(ctx.dtype) for tensor in ctx.saved_tensors)
        g = grad_y.to(ctx.dtype)
        block = float32_product(x, g @ basis) if ctx.transposed else float32_product(g, x @ basis)
        return grad_y, None, None, block, None, None


@contextmanager
def _tapped(layers: Layers, taps: list[_GradientTap]) -> Iterator[None]:
    """Within the block, each layer's adapter is its tap."""
    before = [layer.lora_variant.get(adapter) for _, layer, adapter in layers]
    for (_, layer, adapter), tap in zip(layers, taps, strict=True):
        layer.lora_variant[adapter] = tap
    try:
        yield
    finally:
        for (_, layer, adapter), variant in zip(layers, before, strict=True):
            if variant is None:
                del layer.lora_variant[adapter]
            else:
                layer.lora_variant[adapter] = variant


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Within the block, dropout is off and gradients are None; both are restored after it."""
    modes = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters() if p.requires_grad}
    for module in modes:
        # transformers checkpoints activations in train mode only, in modules that have no dropout of their own.
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
