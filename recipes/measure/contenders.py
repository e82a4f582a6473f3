"""The optimizers that bench_step.py times: adapter shapes, gradients, and how to build each one.

[R25] Bogachev et al., arXiv 2507.12142.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qriemann.errors import InputError
from qriemann.geometry import FixedRankParameter
from qriemann.optim import AdamW, Muon, Riemannion, RiemannLoRA, ScaledAdamW, ScaledGD

Shape = tuple[int, int]
Pair = tuple[nn.Parameter, nn.Parameter]

# (layers, (out_features, in_features) of each linear of a layer, in the order q, k, v, o, gate, up, down); from the models'
# config.json on the Hub.
MODELS: dict[str, tuple[int, tuple[Shape, ...]]] = {
    "smollm2-135m": (30, ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))),
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
GRADIENT_SETS = 3


def adapter_shapes(model: str, layers: int | None = None) -> list[Shape]:
    """(out_features, in_features) of every linear layer but the head.

    Args:
        model: a name of MODELS.
        layers: only the first so many transformer layers.

    Raises:
        InputError: the model is unknown or has fewer layers.
    """
    if model not in MODELS:
        raise InputError(f"--model must be one of {', '.join(MODELS)}, got {model!r}")
    available, shapes = MODELS[model]
    if layers is not None and layers > available:
        raise InputError(f"--layers must be at most {available} for {model}, got {layers}")
    return list(shapes) * (layers or available)


class Gradients:
    """Gradients of all adapters at any point: G = P D Q^T, P (m, k) and Q (n, k) orthonormal in expectation, k = 2 r."""

    def __init__(self, shapes: Sequence[Shape], rank: int, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)
        self._tall = []
        for m, n in shapes:
            inner = min(2 * rank, m, n)
            self._tall.append((self._randn(m, inner) / m**0.5, self._randn(n, inner) / n**0.5))
        # Each set mixes the same directions anew: leading ones that persist, and noise.
        self._middle = [
            [
                torch.diag(0.8 ** torch.arange(p.shape[1], device=device)) + 0.1 * self._randn(p.shape[1], p.shape[1])
                for p, _ in self._tall
            ]
            for _ in range(GRADIENT_SETS)
        ]

    def _randn(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device)

    def leave(self, pairs: Sequence[Pair], turn: int) -> None:
        """Sets .grad of every factor to what a backward pass at the current point would leave, in the factor's layout."""
        for (b, a), (p, q), d in zip(pairs, self._tall, self._middle[turn % GRADIENT_SETS], strict=True):
            b.grad = p @ (d @ (a.data @ q).mT)
            # The V^T of a point is a transposed contiguous V, and so is its gradient.
            a.grad = torch.empty_like(a.data).copy_((b.data.mT @ p) @ d @ q.mT)


class PerLayerRiemannion:
    """Riemannion as the paper's Algorithm 4 reads: layer by layer, QR of the tall bases, SVD of the cores. [R25]

    As in our default, the momentum buffer holds the raw momentum (equations 10 to 12) in the form (C, A, B), and the
    retraction starts from the current point.
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
        optimizer: its `step()` is what is timed.
        cores: S of each adapter, where there is one.
    """

    pairs: list[Pair]
    optimizer: Any
    cores: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        what: a description for people.
        build: makes the contender; the row shows its exception, if it raises one.
        blocks: reads and writes of blocks of a factor's shape in the floor.
        has_core: whether S is read and written too.
    """

    what: str
    build: Callable[[Sequence[Shape], int, torch.device], Contender]
    blocks: int
    has_core: bool = False

    def floor_bytes(self, shapes: Sequence[Shape], rank: int) -> int:
        tall = 4 * rank * sum(m + n for m, n in shapes)
        return self.blocks * tall + (2 * 4 * rank**2 * len(shapes) if self.has_core else 0)


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


def _on_points(make: Callable[[list[Pair], list[Tensor]], Any], scale: float = 1.0) -> Callable[..., Contender]:
    """Builds an optimizer on points with S = scale I."""

    def build(shapes: Sequence[Shape], rank: int, device: torch.device) -> Contender:
        points = _points(shapes, rank, device, scale)
        pairs = [(point.u, point.v_transposed) for point in points]
        optimizer = make(pairs, [point.s for point in points])
        # Read again: Riemannion moves every S into one tensor per shape.
        return Contender(pairs, optimizer, [point.s for point in points])

    return build


def _with(optimizer: type, **options: Any) -> Callable[[list[Pair], list[Tensor]], Any]:
    return lambda pairs, cores: optimizer([factor for pair in pairs for factor in pair], lr=_LR, **options)


def _triton(pairs: list[Pair], cores: list[Tensor]) -> Any:
    from qriemann.ops import triton

    reason = triton.supported(cores[0].device, len(cores[0]))
    if reason is not None:
        raise InputError(f"{reason}; riemannion-offset is the batched PyTorch path")
    return _with(Riemannion, use_triton=True)(pairs, cores)


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


def _on_factors(make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]) -> Callable[..., Contender]:
    """Builds an optimizer on plain LoRA factors."""

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
    "riemannion-offset": Entry("Riemannion, start offset (S = I)", _on_points(_with(Riemannion)), 5, True),
    "riemannion-zero": Entry("Riemannion, start zero (S = 0)", _on_points(_with(Riemannion), 0.0), 5, True),
    "riemannion-triton": Entry("Riemannion, start offset, Triton", _on_points(_triton), 5, True),
    "lora-tsd": Entry("LoRA-TSD, start offset", _on_points(_with(Riemannion, tangent_iterations=3)), 5, True),
    "riemannlora": Entry("RiemannLoRA, start offset", _on_points(_with(RiemannLoRA, simulate_adam=True)), 5, True),
    "riemannlora-plain": Entry(
        "RiemannLoRA without simulate_adam, start offset", _on_points(_with(RiemannLoRA, simulate_adam=False)), 5, True
    ),
    "per-layer": Entry("Riemannion, a loop of QR and SVD", _on_points(PerLayerRiemannion), 5, True),
    "scaled-adamw": Entry("scaled AdamW", _on_factors(lambda named: ScaledAdamW(named, lr=_ADAMW_LR)), 7),
    "scaled-gd": Entry("scaled GD, no momentum", _on_factors(lambda named: ScaledGD(named, lr=_LR)), 3),
    "adamw": Entry("AdamW", _on_factors(lambda named: AdamW(named, lr=_ADAMW_LR)), 7),
    "muon": Entry("Muon on each factor", _on_factors(lambda named: Muon(named, lr=_LR)), 5),
    "peft-riemannian": Entry("PEFT's create_riemannian_optimizer over fused AdamW", _peft, 7),
    BASELINE: Entry(
        "torch AdamW, fused", _on_factors(lambda named: torch.optim.AdamW(named, lr=_ADAMW_LR, fused=True)), 7
    ),
    "adamw-foreach": Entry(
        "torch AdamW, foreach", _on_factors(lambda named: torch.optim.AdamW(named, lr=_ADAMW_LR, foreach=True)), 7
    ),
}
