"""What every optimizer on the fixed-rank manifold shares: param groups, batches of points, state, AdamW for the rest.

The step of every adapter is computed in `qriemann.ops` on whole batches of layers.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from qriemann.errors import InputError
from qriemann.geometry.parameter import FixedRankParameter, fixed_rank_parameters, orthonormality_drift
from qriemann.geometry.point import FixedRankPoint
from qriemann.optim.batch import FactorBatch, StepRule
from qriemann.optim.factors import ADAMW_OPTIONS, GatheringOptimizer, adamw_step, renamed_options
from qriemann.optim.rates import warn_of_another_scale

_ON_MANIFOLD = "fixed_rank"


class FixedRankOptimizer(GatheringOptimizer):
    """Moves points X = U S V^T on the manifold of rank-r matrices, and everything else by torch's fused AdamW.

    A subclass names its options in `__init__` and says by `rule` which of them choose the step; all else is here.

    Args:
        params: a PEFT model (its LoRA layers are put on the manifold if they are not yet), or an iterable of parameters or
            param groups of a model that `qriemann.attach` was called on.
        defaults: the options of a param group, `adamw_lr`, `betas`, `eps` and `adamw_weight_decay` among them.
        attach_options: how a PEFT model is put on the manifold; None values are left to `qriemann.attach`.
        use_triton: take the Triton kernels where they are supported.
        capturable: as in torch.optim.AdamW, the step can be captured in a CUDA graph.
    """

    #: What `lr` is a measure of.
    lr_scale: ClassVar[str]
    #: Options of a param group that a whole batch shares; layers that differ in them are different batches.
    batch_options: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        *,
        attach_options: dict[str, Any],
        use_triton: bool = False,
        capturable: bool = False,
    ) -> None:
        self.check_options(defaults)
        warn_of_another_scale(type(self), defaults, self.lr_scale)
        attach_options = {key: value for key, value in attach_options.items() if value is not None}
        self._model = weakref.ref(params) if isinstance(params, nn.Module) else None
        if isinstance(params, nn.Module):
            params = _trainable(params, attach_options)
        elif attach_options:
            raise InputError(
                f"{', '.join(attach_options)} must come with the model itself, got parameters; pass the PEFT model, or "
                "give it to qriemann.attach"
            )
        self._capturable = capturable
        super().__init__(_split_groups(list(params), defaults), defaults)
        for group in self.param_groups:
            self.check_options(group)
        self._group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        self.points: list[FixedRankParameter] = fixed_rank_parameters(
            p for group in self.param_groups if group[_ON_MANIFOLD] for p in group["params"]
        )
        if not self.points:
            raise InputError(
                "params must hold the factors of an adapter on the fixed-rank manifold, got none; pass the PEFT model "
                "itself, or call qriemann.attach(model) first"
            )
        self._check_pairs()
        by_batch: dict[tuple[Any, ...], list[FixedRankParameter]] = defaultdict(list)
        for point in self.points:
            group = self.param_groups[self._group_of[id(point.u)]]
            by_batch[point.u.device, point.rank, *(group[key] for key in self.batch_options)].append(point)
        self._batches = [FactorBatch(points, use_triton=use_triton or capturable) for points in by_batch.values()]
        for batch in self._batches:
            self._rebind(batch)
            if capturable and not batch.never_synchronizes:
                raise InputError(
                    "capturable must come with adapters that the Triton kernels take, got layers that need the batched "
                    "PyTorch path, which synchronizes; leave capturable out"
                )

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raises InputError for an option out of range."""
        for key in ("lr", "weight_decay", "adamw_lr", "eps", "adamw_weight_decay"):
            value = options[key]
            if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
                raise InputError(f"{key} must be a finite number >= 0, got {value!r}")
        if not 0 <= options["momentum"] < 1:
            raise InputError(f"momentum must be in [0, 1), got {options['momentum']!r}")
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise InputError(f"adamw_betas must be in [0, 1), got {options['betas']!r}")

    def rule(self, group: dict[str, Any]) -> StepRule:
        """How the points of a param group move."""
        raise NotImplementedError

    def _rebind(self, batch: FactorBatch) -> None:
        """Takes up replaced factors; `state` follows, or it would hold the momentum of before and keep its memory alive."""
        batch.rebind()
        if self.state[batch.parameters[0]].get("momentum") is not batch.momentum[0]:
            for parameter, block in zip(batch.parameters, batch.momentum, strict=True):
                self.state[parameter]["momentum"] = block
            if self.rule(self.param_groups[self._group_of[id(batch.points[0].u)]]).simulate_adam:
                for point, norms in zip(batch.points, batch.norms, strict=True):
                    self.state[point.u]["norms"] = norms

    def _check_pairs(self) -> None:
        for point in self.points:
            groups = {self._group_of.get(id(point.u)), self._group_of.get(id(point.v_transposed))}
            if len(groups) > 1:
                raise InputError(
                    f"both factors of an adapter must be in one param group, got {point.name} split; "
                    "its lora_A and lora_B are one point"
                )

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient. A closure is refused: the blocks in .grad are not a loss's partials."""
        if closure is not None:
            raise InputError(
                f"closure must be None: {type(self).__name__} evaluates no loss; call backward() before step()"
            )
        for batch in self._batches:
            self._rebind(batch)
            options = [self.param_groups[self._group_of[id(point.u)]] for point in batch.points]
            lr, weight_decay, momentum = (
                self._vector(batch, options, key) for key in ("lr", "weight_decay", "momentum")
            )
            batch.step(lr, weight_decay, momentum, self.rule(options[0]))
        for group in self.param_groups:
            if not group[_ON_MANIFOLD]:
                adamw_step(self, group, capturable=self._capturable)
        return None

    def _vector(self, batch: FactorBatch, options: list[dict[str, Any]], key: str) -> Tensor:
        """One option of each layer, on the device, without a host synchronization."""
        values = [group[key] for group in options]
        vector = torch.empty(len(values), dtype=torch.float32, device=batch.s.device)
        if all(value is values[0] for value in values):
            return vector.fill_(values[0])
        start = 0
        for end in range(1, len(values) + 1):
            if end == len(values) or values[end] is not values[start]:
                vector[start:end].fill_(values[start])
                start = end
        return vector

    def orthonormality_drift(self) -> float:
        """max |U^T U - I| over all factors, U and V alike; reads the result on the host."""
        return orthonormality_drift(self.points).item()

    @property
    def skipped_updates(self) -> int:
        """Updates of single layers that were not taken because their gradient was not finite; reads it on the host."""
        return sum(int(batch.skipped) for batch in self._batches)

    def state_dict(self) -> dict[str, Any]:
        """As in torch; each factor's entry also holds the factor, and U's the core and the offset."""
        for batch in self._batches:
            self._rebind(batch)
        packed = super().state_dict()
        index_of = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        # Copies, because the live tensors are views: torch.save would write the whole buffer once for each.
        packed["state"] = {
            i: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
            for i, entry in packed["state"].items()
        }
        for point in self.points:
            u_entry = packed["state"][index_of[id(point.u)]]
            u_entry["factor"] = point.u.detach().clone()
            u_entry["core"] = point.s.clone()
            packed["state"][index_of[id(point.v_transposed)]]["factor"] = point.v_transposed.detach().clone()
            if point.offset is not None:
                u_entry |= {f"offset_{key}": value.clone() for key, value in point.offset._asdict().items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores options, momentum and AdamW's state, and moves every point to the saved one."""
        super().load_state_dict(state_dict)
        for batch in self._batches:
            for parameter, block in zip(batch.parameters, batch.momentum, strict=True):
                entry = self.state[parameter]
                block.copy_(entry["momentum"])
                entry["momentum"] = block
            for point, norms in zip(batch.points, batch.norms, strict=True):
                entry = self.state[point.u]
                if "norms" in entry:
                    norms.copy_(entry["norms"])
                    entry["norms"] = norms
        for point in self.points:
            u_entry, v_entry = self.state[point.u], self.state[point.v_transposed]
            if "factor" not in u_entry:
                raise InputError(f"optimizer state must hold the factors of {point.name}, got keys {sorted(u_entry)}")
            point.assign(FixedRankPoint(u_entry.pop("factor"), u_entry.pop("core"), v_entry.pop("factor").mT))
            offset = [u_entry.pop(f"offset_{key}", None) for key in FixedRankPoint._fields]
            # None as well: the start may have been changed after the adapter was put on the manifold.
            point.offset = None if offset[0] is None else FixedRankPoint(*(part.float() for part in offset))
        model = None if self._model is None else self._model()
        if model is not None:
            # Imported here: parameters are all that this layer needs otherwise.
            from qriemann.adapters.attach import describe_saved_rank

            describe_saved_rank(model, self.points)


def _trainable(model: nn.Module, attach_options: dict[str, Any]) -> list[nn.Parameter]:
    # Imported here: parameters are all that this layer needs otherwise.
    from qriemann.adapters.attach import attach

    # Always: points of another adapter say nothing of the active one, and layers on the manifold are left alone.
    attach(model, **attach_options)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _split_groups(params: list[Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Param groups that hold either factors or other parameters; the latter take their rates from the adamw_ options."""
    if not params:
        raise InputError("params must hold at least one trainable parameter, got none; does the model have an adapter?")
    groups = []
    for group in params if isinstance(params[0], dict) else [{"params": params}]:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        options = renamed_options({key: value for key, value in group.items() if key != "params"}, ADAMW_OPTIONS)
        factors = [p for p in members if hasattr(p, "fixed_rank")]
        others = [p for p in members if not hasattr(p, "fixed_rank")]
        if factors:
            groups.append({"params": factors, **options, _ON_MANIFOLD: True})
        if others:
            merged = {**defaults, **options}
            rates = {"lr": merged["adamw_lr"], "weight_decay": merged["adamw_weight_decay"]}
            if not factors:
                # A group made only of such parameters may say plainly what it wants.
                rates |= {key: options[key] for key in ("lr", "weight_decay") if key in options}
            groups.append({"params": others, **options, **rates, _ON_MANIFOLD: False})
    return groups
