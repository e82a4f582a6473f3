"""Layers to step, the same step by the torch path, and the distance between the two."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qriemann import ops
from qriemann.ops.triton.step import TritonStep


@dataclass
class Layer:
    """One point with its momentum's and gradient's blocks; V's are (n, r) here."""

    u: Tensor
    v: Tensor
    s: Tensor
    grad_u: Tensor
    grad_v: Tensor
    m_u: Tensor
    m_v: Tensor

    @property
    def x(self) -> Tensor:
        return self.u.double() @ self.s.double() @ self.v.double().mT

    @property
    def carried(self) -> tuple[Tensor, Tensor]:
        """The momentum at its point, free of the gauge: (M V) V^T and U (M^T U)^T."""
        return self.m_u.double() @ self.v.double().mT, self.u.double() @ self.m_v.double().mT

    @property
    def drift(self) -> float:
        eye = torch.eye(self.s.shape[0], dtype=torch.float64, device=self.s.device)
        return max((f.double().mT @ f.double() - eye).abs().max().item() for f in (self.u, self.v))

    def to(self, kind: torch.dtype | torch.device) -> Layer:
        return Layer(*(value.to(kind) for value in vars(self).values()))

    def clone(self) -> Layer:
        return Layer(*(value.clone(memory_format=torch.contiguous_format) for value in vars(self).values()))


@dataclass
class Maker:
    """Random layers, every number from one generator."""

    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def orthonormal(self, t: int, r: int) -> Tensor:
        return torch.linalg.qr(self.randn(t, r))[0]

    def graded(self, r: int, smallest: float) -> Tensor:
        """An r x r matrix with singular values from 1 to `smallest`."""
        spectrum = torch.logspace(0, torch.tensor(smallest).log10().item(), r, dtype=torch.float64)
        return self.orthonormal(r, r) @ torch.diag(spectrum) @ self.orthonormal(r, r)

    def tangent(self, u: Tensor, v: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """Blocks (G V, G^T U) of a tangent vector whose core has singular values between about 0.3 and 2.

        With `rank`, of the projection of a random G of that rank.
        """
        (m, r), n = u.shape, v.shape[0]
        if rank is not None:
            left, right = self.randn(m, rank), self.randn(n, rank)
            return left @ (right.mT @ v), right @ (left.mT @ u)

        def off(basis: Tensor, t: int) -> Tensor:
            if t == r:
                return torch.zeros(t, r, dtype=torch.float64)
            columns = torch.linalg.qr(torch.cat([basis, self.randn(t, min(r, t - r))], 1))[0][:, r:]
            return columns @ self.graded(r, 0.3)[: columns.shape[1]]

        core = self.graded(r, 0.5)
        return u @ core + off(u, m), v @ core.mT + off(v, n)

    def layer(
        self, m: int, n: int, r: int, s: Tensor | None = None, *, momentum: bool = True, **gradient: Any
    ) -> Layer:
        u, v = self.orthonormal(m, r), self.orthonormal(n, r)
        # Rounded first: a float32 tangent vector belongs to the float32 point.
        u, v = u.float().double(), v.float().double()
        s = torch.eye(r, dtype=torch.float64) if s is None else s
        blocks = self.tangent(u, v, **gradient)
        carried = self.tangent(u, v, **gradient) if momentum else tuple(torch.zeros_like(block) for block in blocks)
        return Layer(u, v, s, *blocks, *carried).to(torch.float32)


@dataclass(frozen=True)
class Options:
    lr: float = 0.01
    weight_decay: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    momentum_form: str = "raw"
    tangent_iterations: int = 1

    @property
    def of_core(self) -> dict[str, Any]:
        return {"momentum_form": self.momentum_form, "tangent_iterations": self.tangent_iterations}


class Stepped:
    """Copies of some layers in a TritonStep."""

    def __init__(self, layers: list[Layer], device: torch.device) -> None:
        self.device = device
        self.layers = [layer.clone().to(device) for layer in layers]
        self.s = torch.stack([layer.s for layer in self.layers])
        for layer, s in zip(self.layers, self.s, strict=True):
            layer.s = s
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.kernels = TritonStep(
            [layer.u for layer in self.layers] + [layer.v for layer in self.layers],
            [layer.m_u for layer in self.layers] + [layer.m_v for layer in self.layers],
            self.s,
            self.skipped,
        )

    @property
    def grads(self) -> list[Tensor | None]:
        """As `.grad` holds them: V's transposed."""
        return [layer.grad_u for layer in self.layers] + [layer.grad_v.mT for layer in self.layers]

    def step(self, options: Options, grads: list[Tensor | None] | None = None) -> list[Layer]:
        vectors = [
            torch.full((len(self.layers),), value, device=self.device)
            for value in (options.lr, options.weight_decay, options.momentum)
        ]
        grads = self.grads if grads is None else grads
        self.kernels.step(grads, *vectors, nesterov=options.nesterov, **options.of_core)
        return self.layers


def torch_step(layer: Layer, options: Options, dtype: torch.dtype = torch.float64) -> Layer:
    """The same step by the torch path, computed in `dtype` throughout."""
    layer = layer.to(dtype)
    sides = []
    for factor, momentum, grad in ((layer.u, layer.m_u, layer.grad_u), (layer.v, layer.m_v, layer.grad_v)):
        carried = options.momentum * momentum + grad
        blocks = [factor, carried, options.momentum * carried + grad] if options.nesterov else [factor, carried]
        sides.append([block[None].clone() for block in blocks])
    vector = torch.ones(1, dtype=dtype, device=layer.s.device)
    result = ops.core(
        torch.stack([ops.gram(blocks) for blocks in sides]),
        layer.s[None],
        options.lr * vector,
        options.weight_decay * vector,
        vector.bool(),
        **options.of_core,
    )
    momenta = [torch.empty_like(blocks[0]) for blocks in sides]
    compensation = [
        ops.correct(blocks[:1], [ops.apply(blocks, t, momentum, torch.empty_like(momentum))])
        for blocks, t, momentum in zip(sides, result.coefficients, momenta, strict=True)
    ]
    s = compensation[0][0] @ result.s[0] @ compensation[1][0]
    return replace(layer, u=sides[0][0][0], v=sides[1][0][0], s=s, m_u=momenta[0][0], m_v=momenta[1][0])


def errors(layer: Layer, truth: Layer, options: Options) -> dict[str, float]:
    """Relative errors of the point and of the momentum's two blocks, whatever the gauge."""
    size = max(truth.x.norm().item(), options.lr * truth.s.shape[0] ** 0.5)
    found = {"x": (layer.x - truth.x).norm().item() / size}
    for name, block, expected in zip(("m_u", "m_v"), layer.carried, truth.carried, strict=True):
        found[name] = (block - expected).norm().item() / max(expected.norm().item(), 1e-30)
    return found
