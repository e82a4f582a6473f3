"""RiemannLoRA: momentum on the fixed-rank manifold without orthogonalization.

[R25v1] Bogachev et al., "RiemannLoRA: a unified Riemannian framework for ambiguity-free LoRA optimization",
arXiv 2507.12142 v1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from qriemann.optim.batch import StepRule
from qriemann.optim.fixed_rank import FixedRankOptimizer
from qriemann.optim.options import options_of


class RiemannLoRA(FixedRankOptimizer):
    """Riemannian gradient descent with averaged gradients on the manifold of rank-r matrices. [R25v1]

    The step of an adapter is X <- truncate((1 - lr wd) X - lr M), M <- momentum M + (1 - momentum) grad the average of
    Riemannian gradients, carried along in the tangent space. momentum=0 is Riemannian SGD. So `lr` has the scale of the
    loss in it, as in SGD.

    With `simulate_adam` the two blocks of M = A V^T + U B^T, A = (I - U U^T) M V and B = M^T U, are each divided by the root
    of an average of the squared Frobenius norm that the gradient's block had. Both averages are corrected for their start
    at zero, as Adam's are. Then each block moves X by about lr in Frobenius norm, whatever the scale of the loss.

    Args:
        params: as `Riemannion`'s.
        lr: >= 0.
        momentum: of the averaged gradient, in [0, 1).
        weight_decay: decoupled decay of X, >= 0.
        simulate_adam: divide each block by its root mean square norm.
        beta2: of the average of squared norms, in [0, 1).
        norm_eps: added to the root.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: for the parameters without a point, as `Riemannion`'s.
        start, alpha, seed: as `Riemannion`'s.

    Raises:
        InputError: as `Riemannion`.

    State: as `Riemannion`'s, where "momentum" is M / (1 - momentum); two numbers more for each layer with `simulate_adam`.
    """

    lr_scale = "the Frobenius norm of a block of one step of X"
    batch_options = ("simulate_adam", "beta2", "norm_eps")

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        simulate_adam: bool = True,
        beta2: float = 0.999,
        norm_eps: float = 1e-8,
        adamw_lr: float = 1e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        start: Literal["offset", "zero"] | None = None,
        alpha: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, options_of(locals()), attach_options={"start": start, "alpha": alpha, "seed": seed})

    def rule(self, group: dict[str, Any]) -> StepRule:
        """How the points of a param group move."""
        return StepRule(direction="linear", **{key: group[key] for key in self.batch_options})
