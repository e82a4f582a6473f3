"""All adapters of one rank on one device as a few tensors, so that a step costs the same number of launches for any depth.

The factors of a batch live in one contiguous buffer a height, and the parameters become views of it; U and V of equal
height share a buffer, whichever layer they belong to. The momentum's blocks lie in buffers of the same shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qriemann import ops
from qriemann.geometry.parameter import FixedRankParameter
from qriemann.ops.core import MomentumForm

if TYPE_CHECKING:
    from qriemann.ops.triton import TritonStep

logger = logging.getLogger(__name__)


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 or bf16 inside: a Gram matrix squares the condition number, and 10 bits squared are none."""
    # Not torch.set_float32_matmul_precision: it raises once anything (transformers' tf32=True) has used this newer setting.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    reduced = [
        (backend, backend.fp32_precision) for backend in backends if backend.fp32_precision not in ("none", "ieee")
    ]
    for backend, _ in reduced:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, chosen in reduced:
            backend.fp32_precision = chosen


@dataclass
class _Height:
    """The sides of one height t: `sides[j]` is i for the U of layer i and L + i for its V."""

    sides: list[int]
    factors: Float[Tensor, "k t r"]
    momentum: Float[Tensor, "k t r"]
    workspace: dict[str, Float[Tensor, "k t r"]] = field(default_factory=dict)


class FactorBatch:
    """L points of rank r on one device, stepped together.

    Args:
        points: the records.
        use_triton: step by the Triton kernels where they are supported; a line says where they are not.

    Attributes:
        points: the records, in order.
        parameters: the 2 L factors: every U, then every V^T.
        momentum: the blocks M V (m, r) and M^T U (n, r) of each factor, in the order of `parameters`; views.
        s: (L, r, r), the cores; each record's `s` is a view.
        skipped: steps that a layer did not take because its gradient was not finite, summed over layers; on the device.
    """

    def __init__(self, points: Sequence[FixedRankParameter], *, use_triton: bool = False) -> None:
        self.points, self._use_triton = list(points), use_triton
        self.parameters: list[nn.Parameter] = [p.u for p in points] + [p.v_transposed for p in points]
        self.momentum: list[Tensor] = [torch.zeros_like(factor, dtype=torch.float32) for factor in self._tall()]
        self.skipped = torch.zeros((), dtype=torch.int64, device=points[0].u.device)
        self._bind()

    def _tall(self) -> list[Tensor]:
        layers = len(self.points)
        return [p.data if side < layers else p.data.mT for side, p in enumerate(self.parameters)]

    def _bind(self) -> None:
        """Gathers factors, momentum and cores into the buffers and makes their owners views of them."""
        layers, tall = len(self.points), self._tall()
        by_height: dict[int, list[int]] = {}
        for side, factor in enumerate(tall):
            by_height.setdefault(factor.shape[0], []).append(side)
        self._heights = []
        for sides in by_height.values():
            factors = torch.stack([tall[side].float() for side in sides])
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
        self._order, self._position = order.to(factors.device), order.argsort().to(factors.device)
        self.skipped = self.skipped.to(factors.device)
        self._kernels = self._make_kernels()

    def _make_kernels(self) -> TritonStep | None:
        """The Triton path, or None where the batched PyTorch path runs."""
        if not self._use_triton:
            return None
        from qriemann.ops import triton

        reason = triton.supported(self.s.device, self.s.shape[-1])
        if reason is not None:
            logger.warning("the batched PyTorch path runs because %s", reason)
            return None
        return triton.TritonStep(self._tall(), self.momentum, self.s, self.skipped)

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
        *,
        nesterov: bool = False,
        momentum_form: MomentumForm = "raw",
        tangent_iterations: int = 1,
    ) -> None:
        """One step of every point that has gradients; the others, momentum included, stay as they are.

        Call `rebind` first.
        """
        if self._kernels is not None:
            self._kernels.step(
                [parameter.grad for parameter in self.parameters],
                lr,
                weight_decay,
                momentum,
                nesterov=nesterov,
                momentum_form=momentum_form,
                tangent_iterations=tangent_iterations,
            )
            return
        with _full_float32():
            self._step(lr, weight_decay, momentum, nesterov, momentum_form, tangent_iterations)

    def _step(
        self,
        lr: Float[Tensor, " layers"],
        weight_decay: Float[Tensor, " layers"],
        momentum: Float[Tensor, " layers"],
        nesterov: bool,
        momentum_form: MomentumForm,
        tangent_iterations: int,
    ) -> None:
        layers = len(self.points)
        with_grad = [p.u.grad is not None and p.v_transposed.grad is not None for p in self.points]
        active = torch.ones(layers, dtype=torch.bool, device=self.s.device)
        if not all(with_grad):
            active.copy_(torch.tensor(with_grad))
        # A layer without gradient keeps its momentum.
        decay = torch.where(active, momentum, 1).repeat(2)[self._order, None, None]

        blocks, first = [], 0
        for height in self._heights:
            last = first + len(height.sides)
            raw = torch.mul(height.momentum, decay[first:last], out=self._workspace(height, "raw"))
            self._add_gradients(raw, height.sides, with_grad)
            blocks.append([height.factors, raw])
            if nesterov:
                ahead = torch.mul(raw, decay[first:last], out=self._workspace(height, "ahead"))
                self._add_gradients(ahead, height.sides, with_grad)
                blocks[-1].append(ahead)
            first = last

        grams = torch.cat([ops.gram(height_blocks) for height_blocks in blocks])[self._position]
        result = ops.core(
            grams.unflatten(0, (2, layers)),
            self.s,
            lr,
            weight_decay,
            active,
            tangent_iterations=tangent_iterations,
            momentum_form=momentum_form,
        )
        self._undo_nonfinite(blocks, active & ~result.moved)

        coefficients = result.coefficients.flatten(0, 1)[self._order].split([len(h.sides) for h in self._heights])
        compensation = torch.cat(
            [
                ops.apply(height_blocks, t, height.momentum, self._workspace(height, "new"))
                for height_blocks, t, height in zip(blocks, coefficients, self._heights, strict=True)
            ]
        )[self._position]
        torch.matmul(compensation[:layers] @ result.s, compensation[layers:], out=self.s)

    def _workspace(self, height: _Height, use: str) -> Float[Tensor, "k t r"]:
        """Room for one tall block."""
        # On the CPU fresh pages cost more than the arithmetic (43 ms against 10 ms a step on the 210 adapters of a 135M
        # Llama), so the room is kept. CUDA's allocator caches: there it is transient.
        if height.factors.device.type != "cpu":
            return torch.empty_like(height.factors)
        if use not in height.workspace:
            height.workspace[use] = torch.empty_like(height.factors)
        return height.workspace[use]

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
