"""Riemannion: Muon carried over to the fixed-rank manifold.

[R25] Bogachev et al., "RiemannLoRA / Riemannion: a unified Riemannian framework for LoRA", arXiv 2507.12142.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from qriemann.ops.core import MomentumForm
from qriemann.optim.batch import StepRule
from qriemann.optim.fixed_rank import FixedRankOptimizer
from qriemann.optim.options import options_of


class Riemannion(FixedRankOptimizer):
    """Orthogonalized momentum on the manifold of rank-r matrices, AdamW for everything else.

    The step of an adapter is X <- truncate((1 - lr wd) X - lr P(polar(M))): M the heavy-ball momentum carried in the tangent
    space, polar its singular values set to one, P the projection onto the tangent space. So `lr` is the spectral norm of
    one step of X and does not compare with an AdamW learning rate. [R25, Algorithm 4]

    Parameters that carry no point (`modules_to_save`, norms, biases) go to a param group of their own and are trained by
    torch's fused AdamW at `adamw_lr`. Parameters without a gradient are left alone, as in torch.

    Args:
        params: a PEFT model (its LoRA layers are put on the manifold if they are not yet), or an iterable of parameters or
            param groups of a model that `qriemann.attach` was called on. A group may set any option below.
        lr: spectral norm of one step of X, >= 0.
        momentum: heavy-ball factor, in [0, 1).
        weight_decay: decoupled decay of X, >= 0.
        nesterov: take the step along gradient + momentum * M.
        momentum_form: "raw" carries M, as the paper's equations 10-12 do; "orthogonalized" carries the direction, as its
            Algorithm 4 line 6 does (then the weight of a gradient in the average depends on its scale).
        tangent_iterations: rounds of polar and tangent projection, >= 1; 3 to 5 give LoRA-TSD's direction [arXiv 2609.02734].
        adamw_lr: learning rate of the parameters without a point.
        adamw_betas, adamw_eps, adamw_weight_decay: as in torch.optim.AdamW.
        use_triton: take the fused Triton kernels on CUDA. Off by default: they pass their tests in Triton's interpreter and
            have not been run on a card.
        capturable: the step can be captured in a CUDA graph; implies `use_triton`, and refuses layers that the kernels do
            not take. A learning rate that changes between replays must be a tensor on the device.
        start, alpha, seed: how a PEFT model is put on the manifold; see `qriemann.attach`, whose defaults None takes.

    Raises:
        InputError: a value out of range, a layer that cannot be trained this way, or nothing to train.

    State: one block of a factor's shape each, half of AdamW's. The state_dict also holds factors, cores and offsets, so
    that loading it restores every point to the bit, whatever dtype the adapter was saved in.
    """

    lr_scale = "the spectral norm of one step of X, whatever the number of steps"
    batch_options = ("nesterov", "momentum_form", "tangent_iterations")

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 5e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        momentum_form: MomentumForm = "raw",
        tangent_iterations: int = 1,
        adamw_lr: float = 1e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        use_triton: bool = False,
        capturable: bool = False,
        start: Literal["offset", "zero"] | None = None,
        alpha: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            params,
            options_of(locals()),
            attach_options={"start": start, "alpha": alpha, "seed": seed},
            use_triton=use_triton,
            capturable=capturable,
        )

    def rule(self, group: dict[str, Any]) -> StepRule:
        """How the points of a param group move."""
        return StepRule(**{key: group[key] for key in self.batch_options})
