"""All adapters of one rank on one device as a few tensors, so that a step costs the same number of launches for any depth.

The factors of a batch live in one contiguous buffer a height, and the parameters become views of it; U and V of equal
height share a buffer, whichever layer they belong to. The momentum's blocks lie in buffers of the same shapes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qriemann import ops
from qriemann.geometry.parameter import FixedRankParameter
from qriemann.ops import POLAR_RTOL
from qriemann.ops.core import MomentumForm

if TYPE_CHECKING:
    from qriemann.ops.triton.step import TritonStep

logger = logging.getLogger(__name__)


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, bf16 or autocast inside: a Gram matrix squares the condition number, and 10 bits squared are none."""
    # Not torch.set_float32_matmul_precision: it raises once anything (transformers' tf32=True) has used this newer setting.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    reduced = [
        (backend, backend.fp32_precision) for backend in backends if backend.fp32_precision not in ("none", "ieee")
    ]
    for backend, _ in reduced:
        backend.fp32_precision = "ieee"
    try:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for backend, chosen in reduced:
            backend.fp32_precision = chosen


class Workspace:
    """Room for the tall blocks that a step overwrites."""

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def take(self, use: Any, shape: Sequence[int], device: torch.device) -> Tensor:
        """An uninitialized float32 tensor; the next call for the same use overwrites it."""
        # On the CPU fresh pages cost more than the arithmetic (43 ms against 10 ms a step on the 210 adapters of a 135M
        # Llama), so the room is kept. CUDA's allocator caches: there it is transient.
        if device.type != "cpu":
            return torch.empty(shape, dtype=torch.float32, device=device)
        size = math.prod(shape)
        if use not in self._kept or self._kept[use].numel() < size:
            self._kept[use] = torch.empty(size, dtype=torch.float32)
        return self._kept[use][:size].view(*shape)


@dataclass(frozen=True)
class StepRule:
    """How the points of a batch move.

    Attributes:
        direction: "polar" orthogonalizes the momentum (Riemannion); "linear" goes along its average (RiemannLoRA).
        nesterov, momentum_form, tangent_iterations: of "polar", see `Riemannion`.
        simulate_adam, beta2, norm_eps: of "linear", see `RiemannLoRA`.
    """

    direction: Literal["polar", "linear"] = "polar"
    nesterov: bool = False
    momentum_form: MomentumForm = "raw"
    tangent_iterations: int = 1
    simulate_adam: bool = False
    beta2: float = 0.999
    norm_eps: float = 1e-8


@dataclass
class _Height:
    """The sides of one height t: `sides[j]` is i for the U of layer i and L + i for its V."""

    sides: list[int]
    factors: Float[Tensor, "k t r"]
    momentum: Float[Tensor, "k t r"]


class FactorBatch:
    """L points of rank r on one device, stepped together.

    Args:
        points: the records.
        use_triton: step by the Triton kernels; where they are not supported, a warning says why.

    Attributes:
        points: the records, in order.
        parameters: the 2 L factors: every U, then every V^T.
        momentum: the blocks M V (m, r) and M^T U (n, r) of each factor, in the order of `parameters`; views.
        s: (L, r, r), the cores; each record's `s` is a view.
        norms: (L, 3), what `simulate_adam` keeps of each layer: averages of the squared norms of the gradient's blocks A and
            B, and the number of steps in them.
        skipped: steps that a layer did not take because its gradient was not finite, summed over layers; on the device.
    """

    def __init__(self, points: Sequence[FixedRankParameter], *, use_triton: bool = False) -> None:
        self.points, self._use_triton, self._workspace = list(points), use_triton, Workspace()
        self.parameters: list[nn.Parameter] = [p.u for p in points] + [p.v_transposed for p in points]
        self.momentum: list[Tensor] = [torch.zeros_like(factor, dtype=torch.float32) for factor in self._tall()]
        self.norms = torch.zeros(len(points), 3, dtype=torch.float32, device=points[0].u.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=points[0].u.device)
        self._bind()

    @property
    def uses_triton(self) -> bool:
        """Whether the Triton kernels take the steps, which then never wait for the device."""
        return self._kernels is not None

    def _tall(self) -> list[Tensor]:
        layers = len(self.points)
        return [p.data if side < layers else p.data.mT for side, p in enumerate(self.parameters)]

    def _bind(self) -> None:
        """Gathers factors, momentum and cores into the buffers and makes their owners views of them."""
        for point in self.points:
            point.follow()
        layers, tall = len(self.points), self._tall()
        by_height: dict[int, list[int]] = {}
        for side, factor in enumerate(tall):
            by_height.setdefault(factor.shape[0], []).append(side)
        self._heights = []
        for sides in by_height.values():
            factors = torch.stack([tall[side] for side in sides])
            momentum = torch.stack([self.momentum[side].to(factors.device) for side in sides])
            for index, side in enumerate(sides):
                self.parameters[side].data = factors[index] if side < layers else factors[index].mT
                self.momentum[side] = momentum[index]
            self._heights.append(_Height(sides, factors, momentum))
        self.s = torch.stack([point.s.to(factors.device, torch.float32) for point in self.points])
        for point, s in zip(self.points, self.s, strict=True):
            point.s = s
        self._addresses = self._current_addresses()
        # Gram matrices are computed height by height and used layer by layer.
        order = torch.tensor([side for height in self._heights for side in height.sides])
        self._order, self._position, self._layer = (
            index.to(factors.device) for index in (order, order.argsort(), order % layers)
        )
        self.skipped, self.norms = self.skipped.to(factors.device), self.norms.to(factors.device)
        self._kernels = self._make_kernels()

    def _make_kernels(self) -> TritonStep | None:
        """The Triton path, or None where the batched PyTorch path runs."""
        if not self._use_triton:
            return None
        from qriemann.ops.triton import supported

        reason = supported(self.s.device, self.s.shape[-1])
        if reason is not None:
            logger.warning("the batched PyTorch path runs because %s", reason)
            return None
        from qriemann.ops.triton.step import TritonStep

        return TritonStep(self._tall(), self.momentum, self.s, self.skipped)

    def _current_addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.parameters] + [point.s.data_ptr() for point in self.points]

    def rebind(self) -> None:
        """Takes up factors that were replaced since the last step (moved, loaded, assigned): call before using them."""
        if self._current_addresses() != self._addresses:
            self._bind()

    def step(
        self,
        lr: Float[Tensor, " layers"],
        weight_decay: Float[Tensor, " layers"],
        momentum: Float[Tensor, " layers"],
        rule: StepRule,
    ) -> None:
        """One step of every point that has gradients; the others, momentum included, stay as they are.

        Call `rebind` first.
        """
        if self._kernels is not None:
            if rule.direction != "polar":
                raise ValueError(f"the Triton kernels step along the polar direction alone, got {rule.direction!r}")
            self._kernels.step(
                [parameter.grad for parameter in self.parameters],
                lr,
                weight_decay,
                momentum,
                nesterov=rule.nesterov,
                momentum_form=rule.momentum_form,
                tangent_iterations=rule.tangent_iterations,
            )
            # torch does not see what kernels write, and no Python code sees the writes of a replayed graph.
            torch.autograd.graph.increment_version([*(height.factors for height in self._heights), self.s])
            if self.s.is_cuda and torch.cuda.is_current_stream_capturing():
                for point in self.points:
                    point.counts_writes = False
            return
        with full_float32():
            self._step(lr, weight_decay, momentum, rule)

    def _step(
        self,
        lr: Float[Tensor, " layers"],
        weight_decay: Float[Tensor, " layers"],
        momentum: Float[Tensor, " layers"],
        rule: StepRule,
    ) -> None:
        layers, rank = len(self.points), self.s.shape[-1]
        with_grad = [p.u.grad is not None and p.v_transposed.grad is not None for p in self.points]
        active, decay = torch.ones(layers, dtype=torch.bool, device=self.s.device), momentum
        if not all(with_grad):
            active.copy_(torch.tensor(with_grad))
            # A layer without gradient keeps its momentum.
            decay = torch.where(active, momentum, 1)
        decay = decay[self._layer, None, None]

        blocks, first = [], 0
        for height in self._heights:
            last = first + len(height.sides)
            raw = torch.mul(height.momentum, decay[first:last], out=self._room(height, "raw"))
            self._add_gradients(raw, height.sides, with_grad)
            blocks.append([height.factors, raw])
            if rule.nesterov or rule.simulate_adam:
                third = self._room(height, "third")
                if rule.nesterov:
                    torch.mul(raw, decay[first:last], out=third)
                else:
                    third.zero_()
                self._add_gradients(third, height.sides, with_grad)
                blocks[-1].append(third)
            first = last

        grams = torch.cat([ops.gram(height_blocks) for height_blocks in blocks])[self._position].unflatten(
            0, (2, layers)
        )
        block_scale = None
        if rule.simulate_adam:
            block_scale = self._block_scale(grams, momentum, active, rule)
            # The gradient's block has served; the direction is the momentum's.
            grams = grams[:, :, : 2 * rank, :rank]
            blocks = [height_blocks[:2] for height_blocks in blocks]
        elif rule.direction == "linear":
            # The buffer holds the sum with weights beta^k; the average's are (1 - beta) beta^k.
            block_scale = (1 - momentum).expand(2, layers)
        result = ops.core(
            grams,
            self.s,
            lr,
            weight_decay,
            active,
            tangent_iterations=rule.tangent_iterations,
            momentum_form=rule.momentum_form,
            block_scale=block_scale,
        )
        if not result.all_finite:
            self._undo_nonfinite(blocks, active & ~result.moved)

        coefficients = result.coefficients.flatten(0, 1)[self._order].split([len(h.sides) for h in self._heights])
        errors = [
            ops.apply(height_blocks, t, height.momentum, self._room(height, "new"))
            for height_blocks, t, height in zip(blocks, coefficients, self._heights, strict=True)
        ]
        compensation = ops.correct([height.factors for height in self._heights], errors)[self._position]
        torch.matmul(compensation[:layers] @ result.s, compensation[layers:], out=self.s)

    def _block_scale(
        self,
        grams: Float[Tensor, "2 layers p q"],
        momentum: Float[Tensor, " layers"],
        active: Bool[Tensor, " layers"],
        rule: StepRule,
    ) -> Float[Tensor, "2 layers"]:
        """What turns the momentum's buffer into Adam's ratio, for the blocks A and B; the gradient's norms are taken up."""
        rank = self.s.shape[-1]
        in_core, squared = grams[:, :, :rank, rank:], grams[:, :, 2 * rank :, rank:]
        full = squared.diagonal(dim1=-2, dim2=-1).sum(-1)
        # ||A||^2 = ||D||^2 - ||U^T D||^2 on side 0; B is the whole of side 1. Where G lies in the span of U, a difference of
        # rounding errors is left, which must not become a direction of length one. 0 * NaN stays NaN, which is not counted.
        normal = full[0] - in_core[0].square().sum((-2, -1))
        normal = torch.where(normal > POLAR_RTOL**2 * full[0], normal, 0 * full[0])
        square_norms = torch.stack([normal, full[1]], -1)
        counted = (active & square_norms.isfinite().all(-1))[:, None]
        averages, steps = self.norms[:, :2], self.norms[:, 2:]
        averages.copy_(torch.where(counted, torch.lerp(square_norms, averages, rule.beta2), averages))
        steps += counted
        # Both averages start at zero. A layer that has never had a gradient has nothing to correct.
        age = steps.clamp_min(1)
        root = (averages / (1 - rule.beta2**age)).sqrt() + rule.norm_eps
        ratio = ((1 - momentum) / (1 - momentum ** age[:, 0]))[:, None] / root
        # A block that has always been zero is zero still.
        return torch.where(averages > 0, ratio, 0).mT

    def _room(self, height: _Height, use: str) -> Float[Tensor, "k t r"]:
        return self._workspace.take((use, height.factors.shape), height.factors.shape, height.factors.device)

    def _add_gradients(self, target: Float[Tensor, "k t r"], sides: list[int], with_grad: list[bool]) -> None:
        layers = len(self.points)
        present = [index for index, side in enumerate(sides) if with_grad[side % layers]]
        if not present:
            return
        targets = target.unbind()
        grads = [self.parameters[sides[index]].grad for index in present]
        torch._foreach_add_(
            [targets[index] for index in present],
            [g if sides[index] < layers else g.mT for index, g in zip(present, grads, strict=True)],  # type: ignore[union-attr]
        )

    def _undo_nonfinite(self, blocks: list[list[Tensor]], stuck: Bool[Tensor, " layers"]) -> None:
        """Takes a non-finite gradient out of the blocks again; its layer keeps everything, and the skip is counted."""
        if not stuck.any():
            return
        self.skipped += stuck.sum()
        first, both_sides = 0, stuck.repeat(2)[self._order]
        for height, (_, *others) in zip(self._heights, blocks, strict=True):
            last = first + len(height.sides)
            rows = both_sides[first:last].nonzero().flatten()
            for block in others:
                block[rows] = height.momentum[rows]
            first = last
