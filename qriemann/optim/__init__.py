"""Optimizers of adapters, as `torch.optim.Optimizer`s over a model's trainable parameters."""

from qriemann.optim.baselines import AdamW, Muon
from qriemann.optim.riemannion import Riemannion
from qriemann.optim.riemannlora import RiemannLoRA
from qriemann.optim.scaled import ScaledAdamW, ScaledGD

__all__ = ["AdamW", "Muon", "RiemannLoRA", "Riemannion", "ScaledAdamW", "ScaledGD"]
