"""Times one optimizer step on all adapters of a model, ours against the others: `python recipes/bench_step.py --rank 16`.

Every optimizer gets the adapters of every linear layer but the head, each its own copy, and the gradient of the same random
G = P D Q^T of low rank plus noise, which is never formed: the factors get G a^T and b^T G, which for a point U S V^T are its
blocks G V and (G^T U)^T. Only `step()` is timed. The optimizers take turns, in an order that rotates, so that a slow moment
of the machine hits all of them; before each step the gradients are computed afresh at the current point, into one of several
buffers, and the caches are overwritten, as a backward pass would.

Bytes, of float32, for L adapters with sum(m + n) rows in all and rank r:

    floor   (reads + writes) 4 r sum(m + n) + 8 L r^2 for optimizers with a core S: each input (factor, gradient, state) read
            once, each output (factor, state) written once. AdamW: 4 + 3 tall blocks. Momentum, Riemannion or Muon: 3 + 2.
    moved   what the dispatched torch operations read and write, one operation at a time: traffic if no cache held anything
            between two of them. What LAPACK or a fused operation does inside is counted once.
    state   what the optimizer keeps of the past: its torch state and the cores S.
    held    all memory that it keeps between steps beside parameters and gradients: state and workspace.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qriemann.errors import InputError
from qriemann.geometry import FixedRankParameter
from qriemann.optim import AdamW, Muon, Riemannion, RiemannLoRA, ScaledAdamW, ScaledGD

Shape = tuple[int, int]
Pair = tuple[nn.Parameter, nn.Parameter]

# (layers, (out_features, in_features) of each linear of a layer, in the order q, k, v, o, gate, up, down); from the models'
# config.json on the Hub.
MODELS: dict[str, tuple[int, tuple[Shape, ...]]] = {
    "smollm2-135m": (
        30,
        ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)),
    ),
    "llama-3.1-8b": (
        32,
        ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)),
    ),
    "qwen3-4b": (
        36,
        ((4096, 2560), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728)),
    ),
}

BASELINE = "adamw-fused"
_LR = 5e-3
_ADAMW_LR = 1e-4
_GRADIENT_SETS = 3
# More than the last-level cache of any CPU core complex or GPU known to us.
_EVICTED_BYTES = 128 * 2**20


def adapter_shapes(model: str, layers: int | None = None) -> list[Shape]:
    """(out_features, in_features) of every linear layer but the head.

    Args:
        model: a name of MODELS, a Hub id or a local folder with a config.json.
        layers: only that many transformer layers.

    Raises:
        InputError: the model cannot be found or built, or has fewer layers.
    """
    if model in MODELS:
        available, shapes = MODELS[model]
        if layers is not None and layers > available:
            raise InputError(f"--layers must be at most {available} for {model}, got {layers}")
        return list(shapes) * (layers or available)
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(model)
        text = config.get_text_config()
        if layers is not None:
            if layers > text.num_hidden_layers:
                raise InputError(f"--layers must be at most {text.num_hidden_layers} for {model}, got {layers}")
            text.num_hidden_layers = layers
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:layers]
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except InputError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"--model must be one of {', '.join(MODELS)}, a Hub id or a folder of a causal language model, got {model!r}: "
            f"{error}"
        ) from error
    head = built.get_output_embeddings()
    weights = [
        (module.weight.mT if isinstance(module, Conv1D) else module.weight).shape
        for module in built.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    if not weights:
        raise InputError(f"--model must have linear layers, got {model!r} without one")
    return [(weight[0], weight[1]) for weight in weights]


class Gradients:
    """Gradients of all adapters at any point: G = P D Q^T, P (m, k) and Q (n, k) orthonormal in expectation, k = 2 r.

    Attributes:
        shapes: (m, n) of each adapter.
        rank: r.
    """

    def __init__(self, shapes: Sequence[Shape], rank: int, device: torch.device, seed: int) -> None:
        self.shapes, self.rank, self.generator = shapes, rank, torch.Generator(device).manual_seed(seed)
        self.device = device
        self._tall = []
        for m, n in shapes:
            inner = min(2 * rank, m, n)
            self._tall.append((self._randn(m, inner) / m**0.5, self._randn(n, inner) / n**0.5))
        # Another mixture of the same directions each time: leading ones that persist, and noise.
        self._middle = [
            [
                torch.diag(0.8 ** torch.arange(p.shape[1], device=device)) + 0.1 * self._randn(p.shape[1], p.shape[1])
                for p, _ in self._tall
            ]
            for _ in range(_GRADIENT_SETS)
        ]
        self._buffers = [
            [(torch.empty(m, rank, device=device), torch.empty(n * rank, device=device)) for m, n in shapes]
            for _ in range(_GRADIENT_SETS)
        ]

    def _randn(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device)

    def leave(self, pairs: Sequence[Pair], turn: int) -> None:
        """Sets .grad of every factor to what a backward pass at the current point would leave, in the factor's layout."""
        middle, buffers = self._middle[turn % _GRADIENT_SETS], self._buffers[turn % _GRADIENT_SETS]
        for (b, a), (p, q), d, (room_b, room_a) in zip(pairs, self._tall, middle, buffers, strict=True):
            # The V^T of a point is a transposed contiguous V, and so is its gradient.
            rows = a.shape[::-1] if a.stride(0) == 1 and self.rank > 1 else a.shape
            grad_a = room_a.view(rows) if rows == a.shape else room_a.view(rows).mT
            b.grad = torch.matmul(p, d @ (a.data @ q).mT, out=room_b)
            a.grad = grad_a.copy_((b.data.mT @ p) @ d @ q.mT)


class PerLayerRiemannion:
    """Riemannion as the paper's Algorithm 4 reads: layer by layer, QR of the tall bases, SVD of the cores. [R25]

    The momentum is the raw one (equations 10 to 12) in the form (C, A, B), and the point is not lost (DESIGN: one Riemannion
    step); that is what Riemannion does by default.
    """

    def __init__(self, pairs: Sequence[Pair], cores: Sequence[Tensor], lr: float = _LR, momentum: float = 0.9) -> None:
        self.pairs, self.cores, self.lr, self.momentum = pairs, cores, lr, momentum
        self.state = {
            index: {"c": torch.zeros_like(s), "a": torch.zeros_like(u), "b": torch.zeros_like(v.mT)}
            for index, ((u, v), s) in enumerate(zip(pairs, cores, strict=True))
        }

    @torch.no_grad()
    def step(self) -> None:
        for (u_parameter, v_parameter), s, state in zip(self.pairs, self.cores, self.state.values(), strict=True):
            u, v = u_parameter.data, v_parameter.data.mT
            assert u_parameter.grad is not None
            assert v_parameter.grad is not None
            grad_u, grad_v, rank = u_parameter.grad, v_parameter.grad.mT, len(s)
            # G projected: C = U^T G V, A = G V - U C, B = G^T U - V C^T.
            c = u.mT @ grad_u
            c_m = self.momentum * state["c"] + c
            a_m = self.momentum * state["a"] + grad_u - u @ c
            b_m = self.momentum * state["b"] + grad_v - v @ c.mT
            # M = [U A] [[C, I], [I, 0]] [V B]^T = Q_U K Q_V^T.
            q_u, r_u = torch.linalg.qr(torch.cat([u, a_m], 1))
            q_v, r_v = torch.linalg.qr(torch.cat([v, b_m], 1))
            eye, zero = torch.eye(rank, device=s.device), torch.zeros_like(s)
            k = r_u @ torch.cat([torch.cat([c_m, eye], 1), torch.cat([eye, zero], 1)]) @ r_v.mT
            # O = P_T(polar(M)).
            left, _, right = torch.linalg.svd(k)
            o = left @ right
            o[rank:, rank:] = 0
            # X+ = the best approximation of rank r of X - lr O.
            left, sigma, right = torch.linalg.svd(r_u[:, :rank] @ s @ r_v[:, :rank].mT - self.lr * o)
            p, w = left[:, :rank], right[:rank].mT
            # M projected to the new tangent space.
            c = p.mT @ k @ w
            state["c"], state["a"], state["b"] = c, q_u @ (k @ w - p @ c), q_v @ (k.mT @ p - w @ c.mT)
            u.copy_(q_u @ p)
            v.copy_(q_v @ w)
            s.copy_(torch.diag(sigma[:rank]))


@dataclass
class Contender:
    """One optimizer with its own adapters.

    Attributes:
        pairs: (b, a) or (U, V^T) of each adapter.
        optimizer: what is timed is its `step()`.
        cores: S of each adapter, where there is one.
        traffic_is_dispatched: False where kernels move the bytes that a torch dispatch mode cannot see.
    """

    pairs: list[Pair]
    optimizer: Any
    cores: list[Tensor] = field(default_factory=list)
    traffic_is_dispatched: bool = True

    def factors(self) -> list[nn.Parameter]:
        return [factor for pair in self.pairs for factor in pair]


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        what: for people.
        build: makes the contender; an exception is the reason that the row shows.
        tall_reads, tall_writes: blocks of a factor's shape in the floor.
        has_core: whether S is read and written too.
    """

    what: str
    build: Callable[[Sequence[Shape], int, torch.device], Contender]
    tall_reads: int
    tall_writes: int
    has_core: bool = False

    def floor_bytes(self, shapes: Sequence[Shape], rank: int) -> int:
        tall = 4 * rank * sum(m + n for m, n in shapes)
        cores = 4 * rank**2 * len(shapes)
        return (self.tall_reads + self.tall_writes) * tall + (2 * cores if self.has_core else 0)


def _points(shapes: Sequence[Shape], rank: int, device: torch.device, scale: float) -> list[FixedRankParameter]:
    generator = torch.Generator(device).manual_seed(0)

    def basis(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, rank, generator=generator, device=device))[0].contiguous()

    return [
        FixedRankParameter(
            f"adapter {index}",
            nn.Parameter(basis(m)),
            nn.Parameter(basis(n).mT),
            scale * torch.eye(rank, device=device),
        )
        for index, (m, n) in enumerate(shapes)
    ]


def _riemannion(scale: float, *, use_triton: bool = False, tangent_iterations: int = 1) -> Callable[..., Contender]:
    def build(shapes: Sequence[Shape], rank: int, device: torch.device) -> Contender:
        if use_triton:
            from qriemann.ops import triton

            reason = triton.supported(device, rank)
            if reason is not None:
                raise InputError(f"{reason}; riemannion-offset is the batched PyTorch path")
        points = _points(shapes, rank, device, scale)
        pairs = [(point.u, point.v_transposed) for point in points]
        factors = [factor for pair in pairs for factor in pair]
        optimizer = Riemannion(factors, lr=_LR, tangent_iterations=tangent_iterations, use_triton=use_triton)
        return Contender(pairs, optimizer, [point.s for point in points], not use_triton)

    return build


def _riemannlora(*, simulate_adam: bool) -> Callable[..., Contender]:
    def build(shapes: Sequence[Shape], rank: int, device: torch.device) -> Contender:
        points = _points(shapes, rank, device, 1.0)
        pairs = [(point.u, point.v_transposed) for point in points]
        optimizer = RiemannLoRA([factor for pair in pairs for factor in pair], lr=_LR, simulate_adam=simulate_adam)
        return Contender(pairs, optimizer, [point.s for point in points])

    return build


def _per_layer(shapes: Sequence[Shape], rank: int, device: torch.device) -> Contender:
    points = _points(shapes, rank, device, 1.0)
    pairs, cores = [(point.u, point.v_transposed) for point in points], [point.s for point in points]
    return Contender(pairs, PerLayerRiemannion(pairs, cores), cores)


def _lora_factors(shapes: Sequence[Shape], rank: int, device: torch.device) -> list[Pair]:
    """b (m, r) and a (r, n) of a LoRA that has trained for a while: neither is zero."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        (
            nn.Parameter(0.01 * torch.randn(m, rank, generator=generator, device=device)),
            nn.Parameter(torch.randn(rank, n, generator=generator, device=device) / n**0.5),
        )
        for m, n in shapes
    ]


def _on_factors(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[..., Contender]:
    def build(shapes: Sequence[Shape], rank: int, device: torch.device) -> Contender:
        pairs = _lora_factors(shapes, rank, device)
        return Contender(pairs, make([factor for pair in pairs for factor in pair]))

    return build


def _on_named_factors(
    make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
) -> Callable[..., Contender]:
    def build(shapes: Sequence[Shape], rank: int, device: torch.device) -> Contender:
        pairs = _lora_factors(shapes, rank, device)
        named = [
            (f"{i}.lora_{side}.weight", f) for i, pair in enumerate(pairs) for side, f in zip("BA", pair, strict=True)
        ]
        return Contender(pairs, make(named))

    return build


def _peft(shapes: Sequence[Shape], rank: int, device: torch.device) -> Contender:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_riemannian_optimizer

    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList()
            for m, n in shapes:
                linear = nn.Linear(n, m, bias=False, device="meta")
                # One number that looks like m n of them: the optimizer never reads the base.
                linear.weight = nn.Parameter(torch.zeros(1, 1, device=device).expand(m, n), requires_grad=False)
                self.linears.append(linear)

    model = get_peft_model(Linears(), LoraConfig(r=rank, target_modules=r"linears\.\d+"))
    wrapped = model.base_model.model.linears
    pairs = [(layer.lora_B["default"].weight, layer.lora_A["default"].weight) for layer in wrapped]
    for pair, start in zip(pairs, _lora_factors(shapes, rank, device), strict=True):
        for factor, value in zip(pair, start, strict=True):
            factor.data.copy_(value.data)
    return Contender(pairs, create_riemannian_optimizer(model, torch.optim.AdamW, lr=_ADAMW_LR, fused=True))


ENTRIES: dict[str, Entry] = {
    "riemannion-offset": Entry("Riemannion, start offset (S = I)", _riemannion(1.0), 3, 2, True),
    "riemannion-zero": Entry("Riemannion, start zero (S = 0)", _riemannion(0.0), 3, 2, True),
    "riemannion-triton": Entry("Riemannion, start offset, Triton", _riemannion(1.0, use_triton=True), 3, 2, True),
    "lora-tsd": Entry("LoRA-TSD, start offset", _riemannion(1.0, tangent_iterations=3), 3, 2, True),
    "riemannlora": Entry("RiemannLoRA, start offset", _riemannlora(simulate_adam=True), 3, 2, True),
    "riemannlora-plain": Entry(
        "RiemannLoRA without simulate_adam, start offset", _riemannlora(simulate_adam=False), 3, 2, True
    ),
    "per-layer": Entry("Riemannion, a loop of QR and SVD", _per_layer, 3, 2, True),
    "scaled-adamw": Entry("scaled AdamW", _on_named_factors(lambda named: ScaledAdamW(named, lr=_ADAMW_LR)), 4, 3),
    "scaled-gd": Entry("scaled GD, no momentum", _on_named_factors(lambda named: ScaledGD(named, lr=_LR)), 2, 1),
    "adamw": Entry("AdamW", _on_named_factors(lambda named: AdamW(named, lr=_ADAMW_LR)), 4, 3),
    "muon": Entry("Muon on each factor", _on_named_factors(lambda named: Muon(named, lr=_LR)), 3, 2),
    "peft-riemannian": Entry("PEFT's create_riemannian_optimizer over fused AdamW", _peft, 4, 3),
    BASELINE: Entry(
        "torch AdamW, fused", _on_factors(lambda factors: torch.optim.AdamW(factors, lr=_ADAMW_LR, fused=True)), 4, 3
    ),
    "adamw-foreach": Entry(
        "torch AdamW, foreach",
        _on_factors(lambda factors: torch.optim.AdamW(factors, lr=_ADAMW_LR, foreach=True)),
        4,
        3,
    ),
}


class Traffic(TorchDispatchMode):
    """Counts dispatched operations that touch data, and the bytes of their inputs and outputs."""

    # Their first argument is only written.
    _OVERWRITES = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})
    # They allocate, or rename: nothing is read or written. (Other views are known by their schema.)
    _UNTOUCHED = frozenset(
        {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}
    )
    # Written only under gradient scaling, whatever the schema says.
    _READ_ONLY = frozenset({("aten::_fused_adamw_", "grads")})

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        if func.is_view or schema.name in self._UNTOUCHED:
            return result
        self.operations += 1
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            size = sum(map(_bytes_of, _tensors(value)))
            written = argument.alias_info is not None and argument.alias_info.is_write
            written = written and (schema.name, argument.name) not in self._READ_ONLY
            overwritten = argument.is_out or (position == 0 and schema.name in self._OVERWRITES)
            self.bytes += size * (written + (not (written and overwritten)))
        results = result if len(schema.returns) > 1 else (result,)
        for returned, value in zip(schema.returns, results, strict=False):
            if returned.alias_info is None:
                self.bytes += sum(map(_bytes_of, _tensors(value)))
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _bytes_of(tensor: Tensor) -> int:
    # An expanded tensor reads less than it shows.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def held_bytes(contender: Contender) -> int:
    """Bytes of all storages that the optimizer reaches, without parameters and gradients."""
    factors = contender.factors()
    outside = {tensor.untyped_storage().data_ptr() for f in factors for tensor in (f, f.grad) if tensor is not None}
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _reachable(contender.optimizer, set())
    }
    return sum(size for address, size in sizes.items() if address not in outside)


def _reachable(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _reachable(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _reachable(item, seen)
    elif isinstance(value, torch.optim.Optimizer) or type(value).__module__.startswith(("qriemann", __name__)):
        yield from _reachable(getattr(value, "__dict__", {}), seen)


def state_bytes(contender: Contender) -> int:
    """Bytes of the optimizer's torch state and of the cores."""
    entries = contender.optimizer.state.values()
    tensors = [*contender.cores, *(value for entry in entries for value in entry.values() if isinstance(value, Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def launches_and_synchronizations(step: Callable[[], None]) -> tuple[int, int]:
    """Kernel launches (a captured graph is one) and host synchronizations of one step on CUDA, from torch.profiler."""

    def count(body: Callable[[], None]) -> tuple[int, int]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            body()
        names = [event.name for event in profile.events()]
        launched = sum(bool(re.match(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)", n)) for n in names)
        # The plain cudaMemcpy blocks; the asynchronous one does not by itself.
        waited = sum(bool(re.match(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$", n)) for n in names)
        return launched, waited

    launched, waited = count(step)
    # The profiler itself waits for the device when it stops.
    return launched, waited - count(lambda: None)[1]


def bench(
    shapes: Sequence[Shape], rank: int, names: Sequence[str], *, rounds: int, warmup: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """A record for each name: times, ratios to BASELINE, bytes, operations, or the reason why there are none."""
    reasons: dict[str, str] = {}
    contenders: dict[str, Contender] = {}
    for name in names:
        try:
            contenders[name] = ENTRIES[name].build(shapes, rank, device)
        except Exception as error:  # A row that cannot run says why; the others go on.
            reasons[name] = _reason(error)
    gradients = Gradients(shapes, rank, device, seed=1)
    eviction = torch.zeros(_EVICTED_BYTES // 4, device=device)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(warmup + rounds):
            order = list(contenders)
            shift = turn % max(len(order), 1)
            for name in order[shift:] + order[:shift]:
                gradients.leave(contenders[name].pairs, turn)
                eviction.add_(1)
                try:
                    elapsed = _timed(contenders[name].optimizer.step, device)
                except Exception as error:
                    reasons[name] = _reason(error)
                    del contenders[name]
                    continue
                if turn >= warmup:
                    times[name].append(elapsed)
            gc.collect()
    finally:
        if was_enabled:
            gc.enable()
    records = {}
    for name in names:
        if name in reasons:
            records[name] = {"what": ENTRIES[name].what, "ran": False, "reason": reasons[name]}
            continue
        gradients.leave(contenders[name].pairs, 0)
        records[name] = {
            "what": ENTRIES[name].what,
            "ran": True,
            "times_ms": times[name],
            **_bytes_and_counts(contenders[name], device),
            "floor_bytes": ENTRIES[name].floor_bytes(shapes, rank),
        }
    _add_statistics(records)
    return records


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _timed(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds on the wall, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _bytes_and_counts(contender: Contender, device: torch.device) -> dict[str, Any]:
    with Traffic() as traffic:
        contender.optimizer.step()
    counts: dict[str, Any] = {"launches": None, "synchronizations": None}
    if device.type == "cuda":
        counts["launches"], counts["synchronizations"] = launches_and_synchronizations(contender.optimizer.step)
    return {
        "state_bytes": state_bytes(contender),
        "held_bytes": held_bytes(contender),
        "moved_bytes": traffic.bytes if contender.traffic_is_dispatched else None,
        "operations": traffic.operations,
        **counts,
    }


def _add_statistics(records: dict[str, dict[str, Any]]) -> None:
    base = records.get(BASELINE, {})
    for record in records.values():
        if not record["ran"]:
            continue
        milliseconds = torch.tensor(record["times_ms"], dtype=torch.float64)
        for key, quantile in (("median_ms", 0.5), ("p10_ms", 0.1), ("p90_ms", 0.9)):
            record[key] = milliseconds.quantile(quantile).item()
    for record in records.values():
        if not record["ran"]:
            continue
        record["ratio_of_medians"] = record["median_of_ratios"] = None
        if base.get("ran"):
            ratios = torch.tensor(record["times_ms"], dtype=torch.float64) / torch.tensor(base["times_ms"])
            record["ratio_of_medians"] = record["median_ms"] / base["median_ms"]
            record["median_of_ratios"] = ratios.quantile(0.5).item()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on and the command line does not say."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": "".join(re.findall(r"BLAS_INFO=(\w+)", torch.__config__.show())),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "nvidia_smi": _nvidia_smi(),
        }
    return facts


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return found[0] if found else platform.processor()


def _nvidia_smi() -> dict[str, str] | str:
    """Power and clocks of every card, or why they are not known."""
    keys = "name,driver_version,power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return {f"card {index}": line for index, line in enumerate(output.strip().splitlines())}


def show(console: Console, report: dict[str, Any]) -> None:
    """Draws the report as a table."""
    settings, host = report["settings"], report["machine"]
    table = Table(
        title=f"one step, {settings['adapters']} adapters of {settings['model']}, rank {settings['rank']}, "
        f"{settings['rounds']} rounds",
        title_justify="left",
    )
    table.add_column("optimizer")
    names = ["median ms", "p10 - p90", "ratio", "by round", "state MiB", "held MiB", "moved MiB", "floor MiB", "ops"]
    names += ["launches", "syncs"] if host["gpu"] else []
    for name in names:
        table.add_column(name, justify="right")
    for name, record in report["results"].items():
        label = Text(name) + Text(f"\n{record['what'] if record['ran'] else record['reason']}", style="dim")
        if not record["ran"]:
            table.add_row(label, "did not run", style="yellow")
            continue
        cells = [
            f"{record['median_ms']:.2f}",
            f"{record['p10_ms']:.2f} - {record['p90_ms']:.2f}",
            _optional(record["ratio_of_medians"], "{:.2f}x"),
            _optional(record["median_of_ratios"], "{:.2f}x"),
            *(_optional(_mebibytes(record[f"{key}_bytes"]), "{:.1f}") for key in ("state", "held", "moved", "floor")),
            str(record["operations"]),
        ]
        if host["gpu"]:
            cells += [str(record["launches"]), str(record["synchronizations"])]
        table.add_row(label, *cells)
    console.print(table)
    where = host["gpu"]["name"] if host["gpu"] else f"{host['cpu']}, {host['threads']} threads"
    load = "" if host["load_average"] is None else f", load {host['load_average'][0]:.1f} before"
    console.print(
        f"ratio: to {BASELINE}, of medians and the median of each round's; {where}, torch {host['torch']}{load}"
    )
    if not host["gpu"]:
        console.print("launches and synchronizations: counted on CUDA only")


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole report, as `--json` keeps it.

    Raises:
        InputError: a name, a device or a rank that cannot be.
    """
    names = list(ENTRIES) if options.only is None else options.only.split(",")
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        raise InputError(f"--only must name some of {', '.join(ENTRIES)}, got {', '.join(map(repr, unknown))}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device must be cpu where there is no CUDA device, got cuda")
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = adapter_shapes(options.model, options.layers)
    smallest = min(min(shape) for shape in shapes)
    if options.rank > smallest:
        raise InputError(f"--rank must be at most {smallest}, the smallest side of a layer, got {options.rank}")
    facts = machine(device)
    results = bench(shapes, options.rank, names, rounds=options.rounds, warmup=options.warmup, device=device)
    settings = {
        "model": options.model,
        "layers": options.layers,
        "rank": options.rank,
        "adapters": len(shapes),
        "shapes": [list(shape) for shape in shapes],
        "device": str(device),
        "rounds": options.rounds,
        "warmup": options.warmup,
        "evicted_bytes": _EVICTED_BYTES,
        "gradient_sets": _GRADIENT_SETS,
    }
    return {"settings": settings, "machine": facts, "results": results}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="bench_step.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help=f"{', '.join(MODELS)}, a Hub id or a local folder (default: %(default)s)",
    )
    parser.add_argument("--rank", type=_count, default=16, help="of every adapter (default: %(default)s)")
    parser.add_argument("--layers", type=_count, help="take only so many transformer layers (default: all)")
    parser.add_argument(
        "--rounds", type=_count, default=30, help="timed steps of each optimizer (default: %(default)s)"
    )
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: %(default)s)")
    parser.add_argument("--threads", type=_count, help="of torch (default: torch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--only", metavar="NAME,...", help=f"some of {', '.join(ENTRIES)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything, every time included, in FILE")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 2 for something the user can mend, which one line then names."""
    options = parse(arguments)
    try:
        report = run(options)
    except InputError as error:
        if options.debug:
            raise
        print(f"bench_step: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    console = Console()
    # Ten columns; a pipe counts as 80 characters wide.
    show(console if console.is_terminal else Console(width=150), report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
