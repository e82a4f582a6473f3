"""What gram, core and apply compute, for one layer, by explicit bases and LAPACK: slow, and short enough to check by eye.

Every tall matrix of a side is a combination z t of the columns z = [U, N] or [U, N, D]; a matrix t of coefficients stands for
it, and x^T W y is the inner product of z x and z y, with W = z^T z. The batched paths agree with these functions up to the
gauge: (U+ Q, Q^T S+ P, V+ P) is the same point for any orthogonal Q and P.

Everything is computed in `dtype`, float64 unless told: float32 gives plain float32's own error, the tests' yardstick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qriemann.ops.core import CoreResult, MomentumForm
from qriemann.ops.factor import PIVOT_TOL
from qriemann.ops.polar import POLAR_RTOL

# The limit of Y + epsilon U V^T for epsilon to 0 decides which directions fill up a Y of rank below r.
_VANISHING = 1e-9


def gram(blocks: Sequence[Float[Tensor, "t r"]], *, dtype: torch.dtype = torch.float64) -> Float[Tensor, "p q"]:
    """[U, N, D]^T [N, D]. As ops.gram."""
    z = torch.cat([block.to(dtype) for block in blocks], -1)
    rank = blocks[0].shape[-1]
    return z.mT @ z[:, rank:]


def core(
    gram: Float[Tensor, "2 p q"],
    s: Float[Tensor, "r r"],
    lr: Float[Tensor, ""],
    weight_decay: Float[Tensor, ""],
    active: Bool[Tensor, ""],
    *,
    tangent_iterations: int = 1,
    momentum_form: MomentumForm = "raw",
    block_scale: Float[Tensor, " two"] | None = None,
    dtype: torch.dtype = torch.float64,
) -> CoreResult:
    """t_u, t_v and the new S, with [U+, N_U+] = z_u t_u, [V+, N_V+] = z_v t_v. As ops.core."""
    rank = s.shape[-1]
    s, lr, weight_decay = s.to(dtype), lr.to(dtype), weight_decay.to(dtype)
    if not (active and gram.isfinite().all()):
        # U+ = U, N+ = N.
        unmoved = torch.eye(gram.shape[-2], 2 * rank, dtype=dtype)
        return CoreResult(torch.stack([unmoved, unmoved]), s, torch.tensor(False))
    w_u, w_v = (_all_inner_products(side.to(dtype), rank) for side in gram)
    # Coefficients of the blocks themselves: U = z e, N = z e_n, D = z e_d.
    e, e_n, e_d = (torch.eye(len(w_u), dtype=dtype)[:, columns] for columns in _columns(len(w_u), rank))

    # U^T N = (V^T N_V)^T = C. Both sides measure it.
    core_n = (e.mT @ w_u @ e_n + (e.mT @ w_v @ e_n).mT) / 2
    core_d = (e.mT @ w_u @ e_d + (e.mT @ w_v @ e_d).mT) / 2
    # A = N - U (U^T N), B = N_V - V (V^T N_V).
    a_n, b_n = e_n - e @ (e.mT @ w_u @ e_n), e_n - e @ (e.mT @ w_v @ e_n)
    a_d, b_d = e_d - e @ (e.mT @ w_u @ e_d), e_d - e @ (e.mT @ w_v @ e_d)

    # D = [U, Q_A] K [V, Q_B]^T, K = [[C, R_B^T], [R_A, 0]] with A = Q_A R_A, B = Q_B R_B.
    q_a, q_b = _orthonormal_basis(a_d, e_d, w_u), _orthonormal_basis(b_d, e_d, w_v)
    basis_u, basis_v = torch.cat([e, q_a], -1), torch.cat([e, q_b], -1)
    r_a, r_b = q_a.mT @ w_u @ a_d, q_b.mT @ w_v @ b_d
    zero = torch.zeros_like(s)
    k = torch.cat([torch.cat([core_d, r_b.mT], 1), torch.cat([r_a, zero], 1)], 0)

    if block_scale is None:
        # O = P_T(polar(... P_T(polar(K)))): the tangent projection P_T zeroes the lower right block.
        for _ in range(tangent_iterations):
            k = polar(k)
            k[rank:, rank:] = 0
    else:
        # O = a_0 A V^T + a_1 U (C V^T + B^T).
        k = torch.cat([block_scale[1].to(dtype) * k[:rank], block_scale[0].to(dtype) * k[rank:]], 0)

    # Y = (1 - lr wd) X - lr O; its best rank-r approximation is P S+ W^T.
    y = -lr * k
    y[:rank, :rank] += (1 - lr * weight_decay) * s
    p, s_new, w = truncate(y)
    # U+ = [U, Q_A] P, V+ = [V, Q_B] W.
    u_new, v_new = basis_u @ p, basis_v @ w

    # M = U C V^T + A V^T + U B^T; with momentum_form "orthogonalized" M = O.
    raw, direction = e @ core_n @ e.mT + a_n @ e.mT + e @ b_n.mT, basis_u @ k @ basis_v.mT
    m = raw if momentum_form == "raw" else direction
    # N_U+ = M V+, N_V+ = M^T U+.
    t_u, t_v = torch.cat([u_new, m @ w_v @ v_new], -1), torch.cat([v_new, m.mT @ w_u @ u_new], -1)
    return CoreResult(torch.stack([t_u, t_v]), s_new, torch.tensor(True))


class ApplyResult(NamedTuple):
    """What ops.apply leaves in blocks[0] and `momentum`, and returns.

    Attributes:
        u: (t, r), U+ with U+^T U+ = I.
        momentum: (t, r), N+.
        compensation: (r, r), the factor that S takes on this side so that X stays as it was.
    """

    u: Float[Tensor, "t r"]
    momentum: Float[Tensor, "t r"]
    compensation: Float[Tensor, "r r"]


def apply(
    blocks: Sequence[Float[Tensor, "t r"]], coefficients: Float[Tensor, "p q"], *, dtype: torch.dtype = torch.float64
) -> ApplyResult:
    """z t = [U~, N+] and U~ = U+ (U~^T U~)^(1/2), the polar decomposition. ops.apply leaves errors under 2e-6 uncorrected."""
    rank = blocks[0].shape[-1]
    z, t = torch.cat([block.to(dtype) for block in blocks], -1), coefficients.to(dtype)
    # U~ = L diag(sigma) R^T: U+ = L R^T, (U~^T U~)^(1/2) = R diag(sigma) R^T.
    left, sigma, right = torch.linalg.svd(z @ t[:, :rank], full_matrices=False)
    return ApplyResult(left @ right, z @ t[:, rank:], right.mT @ torch.diag(sigma) @ right)


def polar(k: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """L R^T of k = L diag(sigma) R^T, without the directions of sigma under POLAR_RTOL times the largest."""
    left, sigma, right = torch.linalg.svd(k)
    return left @ torch.diag((sigma > POLAR_RTOL * sigma[0]).to(k.dtype)) @ right


def truncate(
    y: Float[Tensor, "p p"],
) -> tuple[Float[Tensor, "p r"], Float[Tensor, "r r"], Float[Tensor, "p r"]]:
    """P, S, W with P S W^T the best rank-r approximation of y. [Eckart & Young 1936]"""
    rank = len(y) // 2
    filled = y.clone()
    filled[:rank, :rank] += (_VANISHING * y.norm() if y.any() else 1) * torch.eye(rank, dtype=y.dtype)
    left, _, right = torch.linalg.svd(filled)
    p, w = left[:, :rank], right[:rank].mT
    return p, p.mT @ y @ w, w


def _columns(columns: int, rank: int) -> tuple[slice, slice, slice]:
    """Where U, N and D stand in z; without a third block D is N."""
    return slice(0, rank), slice(rank, 2 * rank), slice(columns - rank, columns)


def _all_inner_products(gram: Float[Tensor, "p q"], rank: int) -> Float[Tensor, "p p"]:
    """W = z^T z from z^T [N, D], with U^T U = I."""
    u_with_u = torch.eye(rank, dtype=gram.dtype)
    return torch.cat([torch.cat([u_with_u, gram[:rank].mT], 0), gram], 1)


def _orthonormal_basis(
    a: Float[Tensor, "p r"], before: Float[Tensor, "p r"], w: Float[Tensor, "p p"]
) -> Float[Tensor, "p r"]:
    """q with q^T W q = I and the span of a, by an eigendecomposition; a zero column for each null direction.

    Null is what has a squared length under PIVOT_TOL once the columns are scaled: entries of W carry float32 rounding
    relative to the lengths that the columns had `before` the projection.
    """
    length = (before.mT @ w @ before).diagonal().clamp_min(0).sqrt()
    scaled = a / torch.where(length > 0, length, 1)
    # scaled^T W scaled = E diag(lambda) E^T, q = scaled E lambda^(-1/2). (An SVD, because eigh can fail on a zero matrix.)
    vectors, values, _ = torch.linalg.svd(scaled.mT @ w @ scaled)
    keep = values > PIVOT_TOL
    return scaled @ vectors * torch.where(keep, torch.where(keep, values, 1).rsqrt(), 0)
