"""The three operations as Triton kernels: five launches for all layers, whatever their shapes.

Triton is optional, so `qriemann.ops` does not import this package, and the package imports Triton only in `supported` and at
the first use of `TritonStep`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qriemann.ops.triton.support import MAX_RANK, supported

if TYPE_CHECKING:
    from qriemann.ops.triton.step import TritonStep

__all__ = ["MAX_RANK", "TritonStep", "supported"]


def __getattr__(name: str) -> Any:
    if name == "TritonStep":
        from qriemann.ops.triton.step import TritonStep

        return TritonStep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
