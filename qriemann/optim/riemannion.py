"""Riemannion: Muon carried over to the fixed-rank manifold.

[R25] Bogachev et al., "RiemannLoRA / Riemannion: a unified Riemannian framework for LoRA", arXiv 2507.12142.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import nn

from qriemann.ops.core import MomentumForm
from qriemann.optim.adapter import ON_ADAPTER
from qriemann.optim.batch import StepRule
from qriemann.optim.fixed_rank import FixedRankOptimizer

_RATE_OF_ONE_MATRIX = 0.15


def default_rate(matrices: int) -> float:
    """The learning rate that does well where so many weight matrices are adapted.

    Each of them moves by `lr` in the spectral norm. What that does to the model's answers adds up as independent errors do,
    with the root of their number. [recipes/results/README.md, "The default rate"]
    """
    return float(f"{_RATE_OF_ONE_MATRIX / math.sqrt(matrices):.2g}")


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
        lr: spectral norm of one step of X, >= 0; None takes `default_rate` of the number of adapted matrices.
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
    usual_lr: ClassVar[float] = default_rate(30 * 7)
    batch_options = ("nesterov", "momentum_form", "tangent_iterations")

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | None = None,
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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "momentum_form": momentum_form,
            "tangent_iterations": tangent_iterations,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        super().__init__(
            params,
            defaults,
            attach_options={"start": start, "alpha": alpha, "seed": seed},
            use_triton=use_triton,
            capturable=capturable,
        )

    def make_groups(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        groups = super().make_groups(params, defaults)
        if defaults["lr"] is None:
            factors = sum(len(group["params"]) for group in groups if group[ON_ADAPTER])
            defaults["lr"] = default_rate(max(factors // 2, 1))
        return groups

    def rule(self, group: dict[str, Any]) -> StepRule:
        """How the points of a param group move."""
        return StepRule(**{key: group[key] for key in self.batch_options})
