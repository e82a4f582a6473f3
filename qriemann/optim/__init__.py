"""Optimizers of adapters, as `torch.optim.Optimizer`s over a model's trainable parameters."""

from qriemann.optim.riemannion import Riemannion
from qriemann.optim.riemannlora import RiemannLoRA

__all__ = ["RiemannLoRA", "Riemannion"]
