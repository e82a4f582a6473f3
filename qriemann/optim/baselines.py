"""The baselines: AdamW and Muon on the factors of plain LoRA adapters, torch's own steps.

[HGY24] Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv 2402.12354.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qriemann.optim.adapter import ON_ADAPTER
from qriemann.optim.factors import FactorOptimizer
from qriemann.optim.options import LearningRateAdjustment, options_of


class AdamW(FactorOptimizer):
    """torch's fused AdamW, with a larger learning rate for B where asked [HGY24].

    Unlike PEFT's `create_loraplus_optimizer`, it gives B's rate to the lora_B alone, not to biases, norms or embeddings.

    Args:
        params: a PEFT model, or its `named_parameters()` or param groups of such. Factors of a model become float32.
        lr: of every parameter except the lora_B, >= 0.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        lora_plus_ratio: learning rate of the lora_B over `lr`, >= 0.

    Raises:
        InputError: a value out of range, or nothing to train.
    """

    lr_scale = "the change of a factor's entry in one step"
    needs_pairs = False

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        lora_plus_ratio: float = 1.0,
    ) -> None:
        super().__init__(params, options_of(locals()))

    def split(self, group: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        # AdamW trains both groups.
        merged = {**defaults, **group, ON_ADAPTER: False}
        fast = [(name, parameter) for name, parameter in group["params"] if ".lora_B." in name]
        rest = [(name, parameter) for name, parameter in group["params"] if ".lora_B." not in name]
        groups = [
            {**merged, "params": rest},
            {**merged, "params": fast, "lr": merged["lr"] * merged["lora_plus_ratio"]},
        ]
        return [group for group in groups if group["params"]]

    def step_adapter(self) -> None:
        pass


class Muon(FactorOptimizer):
    """torch.optim.Muon on each factor by itself, AdamW for everything else.

    The momentum of a factor is orthogonalized (five Newton-Schulz steps in bf16), so `lr` is about the spectral norm of one
    step of a factor, not of X = B A.

    Args:
        params: a PEFT model, or its `named_parameters()` or param groups of such. Factors of a model become float32.
        lr, momentum, weight_decay, nesterov, adjust_lr_fn: as in torch.optim.Muon.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: for parameters that are not factors, as in torch.optim.AdamW.

    Raises:
        InputError: a value out of range, a LoRA layer that is not linear, or nothing to train.
    """

    lr_scale = "the spectral norm of one step of a factor"

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        nesterov: bool = True,
        adjust_lr_fn: LearningRateAdjustment | None = None,
        adamw_lr: float = 1e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, options_of(locals()))
        self._muon = torch.optim.Muon([{**group} for group in self.param_groups if group[ON_ADAPTER]])

    def step_adapter(self) -> None:
        # Loading a state_dict replaces our groups and state, so torch's Muon gets them anew before each step.
        self._muon.param_groups = [self._muon.defaults | group for group in self.param_groups if group[ON_ADAPTER]]
        self._muon.state = self.state
        self._muon.step()
