"""The three operations as Triton kernels: five launches for all layers, whatever their shapes.

Triton is optional: `qriemann.ops` does not import this package, and only `step` and the kernels import Triton.
`supported` says whether they can run; `step.TritonStep` runs them.
"""

from qriemann.ops.triton.support import MAX_RANK, supported

__all__ = ["MAX_RANK", "supported"]
