"""Optimizers on the fixed-rank manifold, as `torch.optim.Optimizer`s over a model's trainable parameters."""

from qriemann.optim.riemannion import Riemannion

__all__ = ["Riemannion"]
