"""The three operations of a fixed-rank optimizer step, each on a whole batch of layers at once: gram, core, apply.

Notation, for one layer (see qriemann.geometry for the manifold): the point is X = U S V^T with U (m, r), V (n, r)
orthonormal. A tangent vector M is held as its *blocks* (M V, M^T U), of shapes (m, r) and (n, r): the gradient arrives in
this form from the layer's backward, and so does the momentum live between steps. A *side* is one of the two tall factors
with its *blocks* of columns: U, the momentum's N and, where the direction differs from the momentum (Nesterov), its D. Every
new tall matrix of the step is a combination of these columns.

    gram   [U, N, D] -> [U, N, D]^T [N, D]     one tall pass; 2 r^2 numbers a side come out, 6 r^2 with D
    core   the small matrices of both sides -> coefficients t and the new S
    apply  [U, N, D], t -> U+, N+              the second tall pass; `correct` keeps every U+ orthonormal
"""

from qriemann.ops.apply import apply, correct, orthonormality_error
from qriemann.ops.core import CoreResult, core
from qriemann.ops.gram import gram
from qriemann.ops.polar import POLAR_RTOL, polar

__all__ = ["POLAR_RTOL", "CoreResult", "apply", "core", "correct", "gram", "orthonormality_error", "polar"]
