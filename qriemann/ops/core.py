"""The step itself, on r x r and 2r x 2r matrices only: project, direction, retract and transport."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qriemann.ops.factor import factor_gram
from qriemann.ops.polar import polar
from qriemann.ops.truncate import truncate

MomentumForm = Literal["raw", "orthogonalized"]


class CoreResult(NamedTuple):
    """What a step needs beside the tall columns.

    Attributes:
        t_u: (b, p, 2r), [U+, N_U+] = z_u t_u.
        t_v: (b, p, 2r), [V+, N_V+] = z_v t_v.
        s: (b, r, r), the new S.
        moved: (b,), the active layers with finite Gram matrices.
    """

    t_u: Float[Tensor, "b p q"]
    t_v: Float[Tensor, "b p q"]
    s: Float[Tensor, "b r r"]
    moved: Bool[Tensor, " b"]


def core(
    gram_u: Float[Tensor, "b p q"],
    gram_v: Float[Tensor, "b p q"],
    s: Float[Tensor, "b r r"],
    lr: Float[Tensor, " b"],
    weight_decay: Float[Tensor, " b"],
    active: Bool[Tensor, " b"],
    *,
    tangent_iterations: int = 1,
    momentum_form: MomentumForm = "raw",
) -> CoreResult:
    """Coefficients of the new factors and of the transported momentum. [R25, Algorithm 4; DESIGN: one Riemannion step]

    Args:
        gram_u: `gram` of z_u = [U, N] or [U, N, D]: N = M V are the momentum's blocks, D the direction's where it differs
            (Nesterov).
        gram_v: likewise, N = M^T U.
        s: the core S of the point.
        lr: spectral norm of the step of X, a layer.
        weight_decay: decoupled, on X, a layer.
        active: layers to move; the others, and those whose Gram matrices are not finite, keep point and momentum.
        tangent_iterations: rounds of polar and projection; 1 is Riemannion, 3 to 5 LoRA-TSD's direction.
        momentum_form: what the transported momentum is: the raw one, or the direction (the paper's Algorithm 4, line 6).

    Returns:
        Coefficients and S in the dtype of `s`; computed in float64.
    """
    rank, dtype = s.shape[-1], s.dtype
    active = active & gram_u.isfinite().all(-1).all(-1) & gram_v.isfinite().all(-1).all(-1)
    keep = active[:, None, None]
    gram_u, gram_v = torch.where(keep, gram_u.double(), 0), torch.where(keep, gram_v.double(), 0)
    s_old, lr, weight_decay = s.double(), lr.double()[:, None, None], weight_decay.double()[:, None, None]

    # Project. On side U: N = U C + A with U^T A = 0; on side V: N = V C^T + B. Both measure C.
    u, v = _Side(gram_u, rank), _Side(gram_v, rank)
    r_a, r_a_inverse = factor_gram(u.normal_direction, u.length)
    r_b, r_b_inverse = factor_gram(v.normal_direction, v.length)

    # Direction: D = [U Q_A] K [V Q_B]^T.
    k = s_old.new_zeros(s.shape[0], 2 * rank, 2 * rank)
    k[:, :rank, :rank] = (u.core_direction + v.core_direction.mT) / 2
    k[:, :rank, rank:] = r_b.mT
    k[:, rank:, :rank] = r_a
    for _ in range(tangent_iterations):
        k = polar(k)
        k[:, rank:, rank:] = 0

    # Retract. Without its first r rows y is -lr O_A, of norm at most lr: so is sigma_{r+1}(y).
    y = -lr * k
    y[:, :rank, :rank] += (1 - lr * weight_decay) * s_old
    p, s_new, w = truncate(y, lr[:, 0, 0].abs())
    p_1, p_2, w_1, w_2 = p[:, :rank], p[:, rank:], w[:, :rank], w[:, rank:]

    # Transport: the blocks of M = N V^T + U B^T at the new point are M V+ = N W_1 + U (B^T V+) and, likewise, M^T U+.
    if momentum_form == "raw":
        core_momentum = (u.core_momentum + v.core_momentum.mT) / 2
        n_u = (core_momentum - u.core_momentum) @ w_1 + v.normal_cross @ r_b_inverse @ w_2, w_1
        n_v = (core_momentum.mT - v.core_momentum) @ p_1 + u.normal_cross @ r_a_inverse @ p_2, p_1
    else:
        o_c, o_b, o_a = k[:, :rank, :rank], k[:, :rank, rank:], k[:, rank:, :rank]
        from_a, from_b = r_a_inverse @ o_a @ w_1, r_b_inverse @ o_b.mT @ p_1
        n_u = o_c @ w_1 + o_b @ w_2 - u.core_direction @ from_a, from_a
        n_v = o_c.mT @ p_1 + o_a.mT @ p_2 - v.core_direction @ from_b, from_b
    t_u = u.coefficients(p_1, r_a_inverse @ p_2, *n_u, of_direction=momentum_form != "raw")
    t_v = v.coefficients(w_1, r_b_inverse @ w_2, *n_v, of_direction=momentum_form != "raw")

    unmoved = torch.eye(gram_u.shape[-2], 2 * rank, dtype=torch.float64, device=s.device)
    return CoreResult(
        torch.where(keep, t_u, unmoved).to(dtype),
        torch.where(keep, t_v, unmoved).to(dtype),
        torch.where(keep, s_new, s_old).to(dtype),
        active,
    )


class _Side:
    """The parts of one side's Gram matrix z^T [N, D]; D = N where z has no third block.

    Attributes:
        core_momentum, core_direction: U^T N, U^T D.
        normal_direction, normal_cross: A_D^T A_D and A_N^T A_D of the normal parts A = N - U (U^T N).
        length: column norms of D, which the rounding of `normal_direction` is relative to.
    """

    def __init__(self, gram: Float[Tensor, "b p q"], rank: int) -> None:
        self.columns, self.rank = gram.shape[-2], rank
        self.core_momentum, self.core_direction = gram[:, :rank, :rank], gram[:, :rank, -rank:]
        direction_squared = gram[:, -rank:, -rank:]
        self.length = direction_squared.diagonal(dim1=-2, dim2=-1).sqrt()
        self.normal_direction = direction_squared - self.core_direction.mT @ self.core_direction
        self.normal_cross = gram[:, rank : 2 * rank, -rank:] - self.core_momentum.mT @ self.core_direction

    def coefficients(
        self,
        p_1: Float[Tensor, "b r r"],
        q_2: Float[Tensor, "b r r"],
        n_1: Float[Tensor, "b r r"],
        n_2: Float[Tensor, "b r r"],
        *,
        of_direction: bool,
    ) -> Float[Tensor, "b p q"]:
        """t with U+ = U p_1 + A_D q_2 and N+ = U n_1 + (N or D) n_2."""
        rank = self.rank
        t = p_1.new_zeros(p_1.shape[0], self.columns, 2 * rank)
        t[:, :rank, :rank] = p_1 - self.core_direction @ q_2
        t[:, -rank:, :rank] = q_2
        t[:, :rank, rank:] = n_1
        source = slice(self.columns - rank, None) if of_direction else slice(rank, 2 * rank)
        t[:, source, rank:] = n_2
        return t
