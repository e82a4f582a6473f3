"""What makes two trainable tensors one point: the record that adapters attach and optimizers find."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qriemann.geometry.point import FixedRankPoint
from qriemann.ops.apply import orthonormality_error

logger = logging.getLogger(__name__)


class CountedWrites:
    """Mixed into a tensor's class: writes through `.data` count in `_version`, as writes to the tensor itself do.

    `.data` returns a tensor with its own version counter, and a tensor assigned to it keeps its own, so comparing `_version`
    would miss writes through either.
    """

    #: What was assigned to `.data` last. It may be a view of a buffer that is written elsewhere, whose count it shares.
    assigned: Tensor | None = None

    @property
    def data(self) -> Tensor:
        return self.detach()  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: Tensor) -> None:
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.assigned = new.detach()
        torch.autograd.graph.increment_version(self)  # type: ignore[arg-type]


class Factor(CountedWrites, nn.Parameter):  # type: ignore[misc]
    """A factor of a point."""


class Core(CountedWrites, Tensor):  # type: ignore[misc]
    """The core of a point."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, object]) -> Core:
        memo[id(self)] = copied = Tensor._make_subclass(Core, self.detach().clone())
        return copied


class Operands(NamedTuple):
    """The factors as a layer multiplies by them: s (X - X_0) = u[:, r:] v^T, with k = r, or 2 r with an offset.

    Attributes:
        v: s [V, V_0].
        u: [s U, U S, -U_0 S_0]: one product with it in backward serves the gradients of V and of the input.
        scaling: s.
        versions: how often the point and its offset had been written.
    """

    v: Float[Tensor, "n k"]
    u: Float[Tensor, "m r+k"]
    scaling: float
    versions: tuple[object, ...]


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
        self._operands: Operands | None = None
        #: False once writes happen that torch does not count: a captured CUDA graph makes them when it is replayed.
        self.counts_writes = True
        # The float32 tensors of U and V^T, which a cast of the model replaces.
        self._full: list[Tensor | None] = [None, None]
        self.mark_factors()

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("u", "v_transposed", "s", "offset"):
            self._operands = None
        if name == "s" and type(value) is Tensor:
            value = Tensor._make_subclass(Core, value)
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, object]:
        # A copy makes operands of its own.
        return self.__dict__ | {"_operands": None}

    def mark_factors(self) -> None:
        """Makes this record the one that optimizers find on the factors, and counts every write to them."""
        for factor in (self.u, self.v_transposed):
            if type(factor) is nn.Parameter:
                factor.__class__ = Factor
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

    def operands(self, scaling: float, dtype: torch.dtype) -> Operands:
        """The factors as a layer multiplies by them, folded and cast once for all passes between two writes.

        Every write counts: to factors, core and offset themselves, to their `.data`, and to the buffers that they are views
        of. Memory that is written outside torch must be reported by `torch.autograd.graph.increment_version`.
        """
        self.follow()
        kept, versions = self._operands, self._versions()
        if versions is None or kept is None or kept.v.dtype != dtype:
            kept = None
        elif kept.scaling != scaling or kept.versions[1] != versions[1]:
            # Not in place: a pass in train mode, where dropout changes the scaling, may have its backward before it.
            kept = None
        elif kept.versions == versions:
            return kept
        made = self._make_operands(kept, scaling, dtype, versions or ())
        self._operands = None if versions is None else made
        return made

    def _versions(self) -> tuple[object, ...] | None:
        """How often the point and its offset have been written; None where torch does not count."""
        owned = [tensor for tensor in (self.u, self.v_transposed, self.s) if isinstance(tensor, CountedWrites)]
        current = [*owned, *(tensor.assigned for tensor in owned if tensor.assigned is not None)]
        frozen = self.offset or ()
        capturing = self.u.is_cuda and torch.cuda.is_current_stream_capturing()
        if len(owned) < 3 or not self.counts_writes or capturing or any(t.is_inference() for t in (*current, *frozen)):
            return None
        return tuple(t._version for t in current), tuple(t._version for t in frozen)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make_operands(
        self, kept: Operands | None, scaling: float, dtype: torch.dtype, versions: tuple[object, ...]
    ) -> Operands:
        """New ones, or `kept` brought up to date."""
        rank, offset = self.rank, self.offset
        if kept is not None:
            # In place, for fewer launches. A backward pass that still needs the old ones finds their count changed.
            v, u, *_ = kept
        else:
            columns = rank + (0 if offset is None else offset.s.shape[0])
            v = torch.empty(self.v_transposed.shape[1], columns, dtype=dtype, device=self.u.device)
            u = v.new_empty(self.u.shape[0], rank + columns)
            if offset is not None:
                torch.mul(offset.v, scaling, out=v[:, rank:])
                u[:, 2 * rank :] = _full_product(offset.u, -offset.s)
        torch.mul(self.v_transposed.mT, scaling, out=v[:, :rank])
        torch.mul(self.u, scaling, out=u[:, :rank])
        u[:, rank : 2 * rank] = _full_product(self.u, self.s)
        return Operands(v, u, scaling, versions)

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


def _full_product(left: Float[Tensor, "m k"], right: Float[Tensor, "k r"]) -> Float[Tensor, "m r"]:
    """left right in float32: into `out`, where autocast rounds nothing."""
    return torch.mm(
        left, right, out=torch.empty(left.shape[0], right.shape[1], dtype=torch.float32, device=left.device)
    )


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
