"""The optimizers that bench_step.py times: the adapters' shapes, the gradients, and how each of them is made.

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
GRADIENT_SETS = 3


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
            for _ in range(GRADIENT_SETS)
        ]
        self._buffers = [
            [(torch.empty(m, rank, device=device), torch.empty(n * rank, device=device)) for m, n in shapes]
            for _ in range(GRADIENT_SETS)
        ]

    def _randn(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device)

    def leave(self, pairs: Sequence[Pair], turn: int) -> None:
        """Sets .grad of every factor to what a backward pass at the current point would leave, in the factor's layout."""
        middle, buffers = self._middle[turn % GRADIENT_SETS], self._buffers[turn % GRADIENT_SETS]
        for (b, a), (p, q), d, (room_b, room_a) in zip(pairs, self._tall, middle, buffers, strict=True):
            # The V^T of a point is a transposed contiguous V, and so is its gradient.
            rows = a.shape[::-1] if a.stride(0) == 1 and self.rank > 1 else a.shape
            grad_a = room_a.view(rows) if rows == a.shape else room_a.view(rows).mT
            b.grad = torch.matmul(p, d @ (a.data @ q).mT, out=room_b)
            a.grad = grad_a.copy_((b.data.mT @ p) @ d @ q.mT)


class PerLayerRiemannion:
    """Riemannion as the paper's Algorithm 4 reads: layer by layer, QR of the tall bases, SVD of the cores. [R25]

    The momentum is the raw one (equations 10 to 12) in the form (C, A, B), and the point is not lost; that is
    what Riemannion does by default.
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
