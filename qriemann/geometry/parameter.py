"""What makes two trainable tensors one point: the record that adapters attach and optimizers find."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qriemann.geometry.point import FixedRankPoint
from qriemann.ops.apply import orthonormality_error

logger = logging.getLogger(__name__)


class FixedRankParameter:
    """One adapter's point X = U S V^T, held by two `nn.Parameter`s and a core.

    `u` is (m, r) and `v_transposed` is (r, n), so that they can be the `lora_B.weight` and `lora_A.weight` of a PEFT
    layer. Their `.grad` are the blocks G V and (G^T U)^T, not the partial derivatives (which would be G V S^T and
    S^T U^T G): nobody ever divides by S.

    Attributes:
        name: the layer's qualified name, for messages.
        u: U.
        v_transposed: V^T.
        s: the core S, float32, on the same device. Replaced in place by optimizers.
        offset: the frozen point that the layer subtracts, or None.
    """

    def __init__(
        self,
        name: str,
        u: nn.Parameter,
        v_transposed: nn.Parameter,
        s: Float[Tensor, "r r"],
        offset: FixedRankPoint | None = None,
    ) -> None:
        self.name, self.u, self.v_transposed, self.s, self.offset = name, u, v_transposed, s, offset
        # The float32 tensors of U and V^T, which a cast of the model replaces.
        self._full: list[Tensor | None] = [None, None]
        self.mark_factors()

    def mark_factors(self) -> None:
        """Makes this record the one that optimizers find on the factors."""
        self.u.fixed_rank = self  # type: ignore[attr-defined]
        self.v_transposed.fixed_rank = self  # type: ignore[attr-defined]

    def follow(self) -> None:
        """Undoes what a cast of the model did to the factors, and moves core and offset to where the factors are.

        Core and offset are no module's buffers, so `model.to` leaves them; and X minus its offset is a small difference, of
        which factors in 16 bits lose more than they do of X. Where the cast factors are no longer those that were kept, they
        become float32 as they are, with a warning.
        """
        for index, factor in enumerate((self.u, self.v_transposed)):
            if factor.dtype == torch.float32:
                self._full[index] = factor.data
                continue
            kept = self._full[index]
            if kept is not None and torch.equal(kept.to(factor.device, factor.dtype), factor.data):
                factor.data = kept.to(factor.device)
            else:
                logger.warning(
                    "the factors of %s were cast to %s and changed; they are rounded", self.name, factor.dtype
                )
                factor.data = factor.data.float()
            self._full[index] = factor.data
        device = self.u.device
        if self.s.device != device:
            self.s = self.s.to(device)
            if self.offset is not None:
                self.offset = FixedRankPoint(*(part.to(device) for part in self.offset))

    @property
    def rank(self) -> int:
        return self.s.shape[0]

    def point(self) -> FixedRankPoint:
        """The current point, float32; views of the live tensors."""
        self.follow()
        return FixedRankPoint(self.u.data, self.s, self.v_transposed.data.mT)

    def assign(self, point: FixedRankPoint) -> None:
        """Moves to `point`, as float32; U and V keep their parameters' identity."""
        self.u.data = point.u.float().contiguous()
        # Stored so that V itself is contiguous: the optimizer works on V, and gradients arrive in its layout.
        self.v_transposed.data = point.v.float().contiguous().mT
        self.s.copy_(point.s)
        self._full = [self.u.data, self.v_transposed.data]


def fixed_rank_parameters(parameters: Iterable[Tensor]) -> list[FixedRankParameter]:
    """The points that `parameters` belong to, each once, in the order of first appearance."""
    found = (getattr(parameter, "fixed_rank", None) for parameter in parameters)
    return list(dict.fromkeys(record for record in found if record is not None))


def orthonormality_drift(points: Iterable[FixedRankParameter]) -> Tensor:
    """max |U^T U - I| and |V^T V - I| over all entries of all points, 0 without any.

    In float64, whatever TF32 and autocast do. No host synchronization.
    """
    by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
    for record in points:
        for basis in (record.u.data, record.v_transposed.data.mT):
            by_shape[basis.shape, basis.device].append(basis)
    errors = [orthonormality_error(torch.stack(bases).double()).abs().max() for bases in by_shape.values()]
    return torch.stack([error.to(errors[0].device) for error in errors]).max() if errors else torch.zeros(())
