"""What every optimizer on the fixed-rank manifold shares: param groups, batches of points and their state.

The step of every adapter is computed in `qriemann.ops` on whole batches of layers.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qriemann.errors import InputError
from qriemann.geometry.parameter import FixedRankParameter, fixed_rank_parameters, orthonormality_drift
from qriemann.geometry.point import FixedRankPoint
from qriemann.optim.adapter import ON_ADAPTER, AdapterOptimizer, adapter_and_rest
from qriemann.optim.batch import FactorBatch, StepRule
from qriemann.optim.options import check_options


class FixedRankOptimizer(AdapterOptimizer):
    """Moves points X = U S V^T on the manifold of rank-r matrices, and everything else by torch's fused AdamW.

    A subclass names its options in `__init__`, and `rule` turns them into a step.

    Args:
        params: a PEFT model (its LoRA layers are put on the manifold if they are not yet), or an iterable of parameters or
            param groups of a model that `qriemann.attach` was called on.
        defaults: the options of a param group.
        attach_options: how a PEFT model is put on the manifold; None values are left to `qriemann.attach`.
        use_triton: take the Triton kernels where they are supported.
        capturable: as in torch.optim.AdamW, the step can be captured in a CUDA graph.
    """

    takes_closure = False
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
        self._model = weakref.ref(params) if isinstance(params, nn.Module) else None
        self._attach_options = {key: value for key, value in attach_options.items() if value is not None}
        self.capturable = capturable
        super().__init__(params, defaults)
        self._group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        self.points: list[FixedRankParameter] = fixed_rank_parameters(
            p for group in self.param_groups if group[ON_ADAPTER] for p in group["params"]
        )
        if not self.points:
            raise InputError(
                "params must hold the factors of an adapter on the fixed-rank manifold, got none; pass the PEFT model "
                "itself, or call qriemann.attach(model) first"
            )
        by_batch: dict[tuple[Any, ...], list[FixedRankParameter]] = defaultdict(list)
        for point in self.points:
            if self._group_of.get(id(point.u)) != self._group_of.get(id(point.v_transposed)):
                raise InputError(
                    f"both factors of an adapter must be in one param group, got {point.name} split; "
                    "its lora_A and lora_B are one point"
                )
            options = self._options(point)
            by_batch[point.u.device, point.rank, *(options[key] for key in self.batch_options)].append(point)
        self._batches = [FactorBatch(points, use_triton=use_triton or capturable) for points in by_batch.values()]
        for batch in self._batches:
            self._rebind(batch)
            if capturable and not batch.uses_triton:
                raise InputError(
                    "capturable must come with adapters that the Triton kernels take, got layers that need the batched "
                    "PyTorch path, which synchronizes; leave capturable out"
                )

    def make_groups(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        if isinstance(params, nn.Module):
            # Imported here: everything else in this folder needs parameters alone.
            from qriemann.adapters.attach import attach

            # Always: another adapter's points say nothing about the active one, and layers on the manifold are left alone.
            attach(params, **self._attach_options)
            params = [parameter for parameter in params.parameters() if parameter.requires_grad]
        elif self._attach_options:
            raise InputError(
                f"{', '.join(self._attach_options)} must come with the model itself, got parameters; pass the PEFT model, "
                "or give it to qriemann.attach"
            )
        params = list(params)
        if not params:
            raise InputError(
                "params must hold at least one trainable parameter, got none; does the model have an adapter?"
            )
        groups = []
        for group in params if isinstance(params[0], dict) else [{"params": params}]:
            check_options({**defaults, **group})
            members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            options = {key: value for key, value in group.items() if key != "params"}
            groups += adapter_and_rest(members, [hasattr(p, "fixed_rank") for p in members], options, defaults)
        return groups

    def rule(self, group: dict[str, Any]) -> StepRule:
        """How the points of a param group move."""
        raise NotImplementedError

    def _options(self, point: FixedRankParameter) -> dict[str, Any]:
        return self.param_groups[self._group_of[id(point.u)]]

    def _rebind(self, batch: FactorBatch) -> None:
        """Follows factors that were replaced; a stale `state` would hold the old momentum and keep its memory alive."""
        batch.rebind()
        if self.state[batch.parameters[0]].get("momentum") is not batch.momentum[0]:
            for parameter, block in zip(batch.parameters, batch.momentum, strict=True):
                self.state[parameter]["momentum"] = block
            if self.rule(self._options(batch.points[0])).simulate_adam:
                for point, norms in zip(batch.points, batch.norms, strict=True):
                    self.state[point.u]["norms"] = norms

    def step_adapter(self) -> None:
        for batch in self._batches:
            self._rebind(batch)
            options = [self._options(point) for point in batch.points]
            lr, weight_decay, momentum = (
                self._vector(batch, options, key) for key in ("lr", "weight_decay", "momentum")
            )
            batch.step(lr, weight_decay, momentum, self.rule(options[0]))

    def _vector(self, batch: FactorBatch, options: list[dict[str, Any]], key: str) -> Tensor:
        """One option of each layer, on the device, without a host synchronization."""
        vector = torch.empty(len(options), dtype=torch.float32, device=batch.s.device)
        start = 0
        for _, members in itertools.groupby(options, key=id):
            group, *others = members
            end = start + 1 + len(others)
            vector[start:end].fill_(group[key])
            start = end
        return vector

    def orthonormality_drift(self) -> float:
        """max |U^T U - I| over all factors, U and V alike; reads the result on the host."""
        return orthonormality_drift(self.points).item()

    @property
    def skipped_updates(self) -> int:
        """How many updates of single layers were skipped for a non-finite gradient; reads the count on the host."""
        return sum(int(batch.skipped) for batch in self._batches)

    def saved_adapter(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        for batch in self._batches:
            self._rebind(batch)
        for point in self.points:
            offset = {} if point.offset is None else point.offset._asdict()
            parts = {"factor": point.u, "core": point.s, **{f"offset_{key}": value for key, value in offset.items()}}
            yield point.u, parts
            yield point.v_transposed, {"factor": point.v_transposed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores options, momentum and AdamW's state, and moves every point to the saved one."""
        super().load_state_dict(state_dict)
        for point in self.points:
            u_entry, v_entry = self.state[point.u], self.state[point.v_transposed]
            if "factor" not in u_entry:
                raise InputError(f"optimizer state must hold the factors of {point.name}, got keys {sorted(u_entry)}")
            point.assign(FixedRankPoint(u_entry.pop("factor"), u_entry.pop("core"), v_entry.pop("factor").mT))
            offset = [u_entry.pop(f"offset_{key}", None) for key in FixedRankPoint._fields]
            # None as well: the start may have been changed after the adapter was put on the manifold.
            point.offset = None if offset[0] is None else FixedRankPoint(*(part.float() for part in offset))
        for batch in self._batches:
            batch.momentum = [self.state[parameter]["momentum"] for parameter in batch.parameters]
            if "norms" in self.state[batch.points[0].u]:
                batch.norms = torch.stack([self.state[point.u]["norms"] for point in batch.points])
            self._rebind(batch)
        model = None if self._model is None else self._model()
        if model is not None:
            from qriemann.adapters.saved_rank import describe_saved_rank

            describe_saved_rank(model, self.points)
