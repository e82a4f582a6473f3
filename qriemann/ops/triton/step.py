"""One step of all layers of a batch: builds the tables of addresses, allocates once, launches five kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from qriemann.ops.apply import _CORRECT_ABOVE
from qriemann.ops.core import MomentumForm
from qriemann.ops.factor import PIVOT_TOL
from qriemann.ops.polar import _COEFFICIENTS
from qriemann.ops.triton.apply import apply_kernel, correct_kernel, finish_kernel
from qriemann.ops.triton.core import SLOT_BLOCKS, core_kernel
from qriemann.ops.triton.gram import gram_kernel
from qriemann.ops.triton.sides import FIELDS


@dataclass(frozen=True)
class _Launch:
    """Sizes of tiles for one padded rank.

    Attributes:
        rows: rows of a tall tile. A product that runs without tensor cores holds its operands in registers for the whole
            inner dimension, so more rows would spill.
        chunk: rows of one program of a tall pass. A chunk leaves up to 4 (PADDED, PADDED) blocks of partial sums, so
            it grows with the rank: they are 3 to 6 % of what a chunk reads.
        width: edge of the part of a Gram matrix that one program holds.
        depth: inner dimension of the products of `apply` and `core`.
        tall_warps, core_warps: warps of the tall passes and of the small matrices.
    """

    rows: int
    chunk: int
    width: int
    depth: int
    tall_warps: int
    core_warps: int


# Chosen by what ptxas reports for sm_80 and sm_90: at most 128 registers a thread in the tall passes, no or a few bytes of
# spills. Not yet timed on a GPU.
_LAUNCHES = {
    16: _Launch(rows=16, chunk=1024, width=16, depth=16, tall_warps=4, core_warps=4),
    32: _Launch(rows=16, chunk=1024, width=32, depth=16, tall_warps=8, core_warps=4),
    64: _Launch(rows=16, chunk=2048, width=64, depth=16, tall_warps=8, core_warps=8),
    128: _Launch(rows=16, chunk=4096, width=64, depth=16, tall_warps=16, core_warps=16),
}
# Two programs of 8 warps a multiprocessor instead of one, so that one loads while the other multiplies.
_TALL_REGISTERS = 128
# One stage: a pipelined loop would read ahead of the barriers that order this code's memory.
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


class TritonStep:
    """The tables and the scratch of one batch; `step` changes factors, momentum and S in place.

    Everything is launched on the current stream; nothing synchronizes with the host, no choice on the host depends on a
    value on the device, and the same inputs give the same bits. A step can be captured in a CUDA graph; run one with the same
    options before the capture, so that the kernels are compiled and the scratch is there.

    Args:
        factors: U of every layer, then V of every layer: contiguous float32 (t, r).
        momentum: their blocks M V and M^T U, likewise.
        s: the cores, contiguous float32 (L, r, r).
        skipped: int64 scalar on the device; grows by one for each layer whose gradient was there but not finite.

    The tensors are remembered by address: make a new object when one of them is replaced.

    Attributes:
        moved: (L,), 1 where the last step moved the layer; on the device.
    """

    def __init__(
        self,
        factors: Sequence[Float[Tensor, "_ r"]],
        momentum: Sequence[Float[Tensor, "_ r"]],
        s: Float[Tensor, "layers r r"],
        skipped: Tensor,
    ) -> None:
        layers, rank = s.shape[0], s.shape[-1]
        self.layers, self.rank, self.padded = layers, rank, max(16, triton.next_power_of_2(rank))
        self._launch = _LAUNCHES[self.padded]
        self._tall_options = {
            "RANK": rank, "PADDED": self.padded, "ROWS": self._launch.rows, "CHUNK": self._launch.chunk,
            "num_warps": self._launch.tall_warps, "maxnreg": _TALL_REGISTERS, **_OPTIONS,
        }  # fmt: skip
        self._s, self._skipped = s, skipped
        # Held, because the table holds only their addresses.
        self._factors, self._momentum = list(factors), list(momentum)
        self._fixed = [(u.data_ptr(), m.data_ptr(), u.shape[0]) for u, m in zip(factors, momentum, strict=True)]
        self._rows: list[tuple[int, ...]] = []
        self._table = torch.zeros(2 * layers, FIELDS.value, dtype=torch.int64, device=s.device)
        self._captured: list[Tensor] = []
        self._spare: Tensor | None = None
        self._reserve_host_rows()
        self._cut_into_chunks([u.shape[0] for u in factors], s.device)
        self._polar = torch.tensor([(a, b) for _, a, b in _COEFFICIENTS], dtype=torch.float32, device=s.device)

        block = self.padded**2
        processors = torch.cuda.get_device_properties(s.device).multi_processor_count if s.is_cuda else 2
        # A program of a high rank fills a multiprocessor alone; more slots would only be more memory.
        self._slots = min(layers, processors * (1 if self.padded > 32 else 4))
        self._scratch = s.new_empty(self._slots * SLOT_BLOCKS * block)
        self._coefficients = s.new_empty(2 * layers * 4 * block)
        self._s_new = s.new_empty(layers * block)
        self._partials: Tensor | None = None
        self.moved = torch.zeros(layers, dtype=torch.int32, device=s.device)
        self._drifted = torch.zeros(2 * layers, dtype=torch.int32, device=s.device)

    def _cut_into_chunks(self, heights: list[int], device: torch.device) -> None:
        tiles, side_tiles = [], [0]
        for side, height in enumerate(heights):
            tiles += [(side, first) for first in range(0, height, self._launch.chunk)]
            side_tiles.append(len(tiles))
        self._tiles = torch.tensor(tiles, dtype=torch.int32, device=device)
        self._side_tiles = torch.tensor(side_tiles, dtype=torch.int32, device=device)

    def step(
        self,
        grads: Sequence[Tensor | None],
        lr: Float[Tensor, " layers"],
        weight_decay: Float[Tensor, " layers"],
        momentum: Float[Tensor, " layers"],
        *,
        nesterov: bool = False,
        momentum_form: MomentumForm = "raw",
        tangent_iterations: int = 1,
    ) -> None:
        """One step of every layer that has both gradients; the others, momentum included, stay as they are.

        Args:
            grads: as they lie in `.grad`: G V (m, r) of every layer, then (G^T U)^T (r, n) of every layer; float32 of any
                strides, or None.
            lr, weight_decay, momentum: float32, contiguous, on the device.
        """
        raw = momentum_form == "raw"
        shape, tiles = {"RANK": self.rank, "PADDED": self.padded}, self._tiles.shape[0]
        small = {**shape, **_OPTIONS, "DEPTH": self._launch.depth, "num_warps": self._launch.core_warps}
        tall = {**self._tall_options, "DEPTH": self._launch.depth}

        self._gram(grads, momentum, nesterov=nesterov)
        core_kernel[(self._slots,)](
            self._table, self._side_tiles, self._partials, self._s, lr, weight_decay, self._polar, self._scratch,
            self._coefficients, self._s_new, self.moved, self._skipped, self.layers, PIVOT_TOL,
            POLAR_STEPS=len(_COEFFICIENTS), TANGENT_ITERATIONS=tangent_iterations, NESTEROV=nesterov, RAW=raw, **small,
        )  # fmt: skip
        apply_kernel[(tiles,)](
            self._table, self._tiles, momentum, self.moved, self._coefficients, self._partials, self.layers,
            NESTEROV=nesterov, RAW=raw, **tall,
        )  # fmt: skip
        finish_kernel[(self.layers,)](
            self._side_tiles, self.moved, self._drifted, self._coefficients, self._partials, self._s_new, self._s,
            self.layers, _CORRECT_ABOVE, **small,
        )  # fmt: skip
        correct_kernel[(tiles,)](
            self._table, self._tiles, self.moved, self._drifted, self._coefficients, self.layers, **tall,
        )  # fmt: skip

    def _gram(self, grads: Sequence[Tensor | None], momentum: Tensor, *, nesterov: bool) -> None:
        """The first pass: leaves the partial sums of every chunk."""
        self._fill_table(grads)
        tiles, size = self._tiles.shape[0], (4 if nesterov else 2) * self.padded**2
        if self._partials is None or self._partials.numel() < tiles * size:
            self._partials = torch.empty(tiles * size, dtype=torch.float32, device=self._s.device)
        # Nesterov's four products a part, not two, need smaller parts.
        width = min(self._launch.width, 32) if nesterov else self._launch.width
        gram_kernel[((self.padded // width) ** 2, tiles)](
            self._table, self._tiles, momentum, self._partials, self.layers,
            WIDTH=width, NESTEROV=nesterov, **self._tall_options,
        )  # fmt: skip

    def _fill_table(self, grads: Sequence[Tensor | None]) -> None:
        """Writes the gradients' addresses where they differ from the last step's."""
        layers, rank = self.layers, self.rank
        rows: list[tuple[int, ...]] = []
        for side, (grad, (u, m, height)) in enumerate(zip(grads, self._fixed, strict=True)):
            if grad is None or grads[side - layers] is None:
                rows.append((u, m, 0, height, 0, 0))
                continue
            shape = (height, rank) if side < layers else (rank, height)
            if grad.dtype != torch.float32 or grad.shape != shape or grad.device != self._s.device:
                raise TypeError(
                    f"the gradient of side {side} must be float32 {shape} on {self._s.device}, "
                    f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
                )
            strides = grad.stride() if side < layers else grad.stride()[::-1]
            rows.append((u, m, grad.data_ptr(), height, *strides))
        capturing = self._table.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing:
            # Always recorded: at a replay the table may hold an eager step's addresses. Every replay reads this host memory
            # again, and none can be pinned during a capture.
            host = self._reserve_host_rows()
            host.copy_(torch.tensor(rows, dtype=torch.int64))
            self._captured.append(host)
            self._spare = None
        else:
            self._reserve_host_rows()
            if rows == self._rows:
                return
            # A fresh pinned tensor each time: torch gives its memory out again only when the copy has read it.
            host = torch.tensor(rows, dtype=torch.int64, pin_memory=self._table.is_cuda)
        self._table.copy_(host, non_blocking=True)
        self._rows = [] if capturing else rows

    def _reserve_host_rows(self) -> Tensor:
        """Pinned memory for the next capture."""
        if self._spare is None:
            self._spare = torch.empty(self._table.shape, dtype=torch.int64, pin_memory=self._table.is_cuda)
        return self._spare
