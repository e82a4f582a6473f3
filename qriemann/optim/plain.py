"""The baselines: AdamW and Muon on the factors of plain LoRA adapters, torch's own steps.

[HGY24] Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv 2402.12354.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from qriemann.errors import InputError
from qriemann.optim.factors import ON_FACTORS, FactorOptimizer, adamw_step, split_factors

LearningRateAdjustment = Literal["original", "match_rms_adamw"]


class AdamW(FactorOptimizer):
    """torch's fused AdamW, with a larger learning rate for B where asked [HGY24].

    PEFT's `create_loraplus_optimizer` is not this one at ratio 1: it gives biases and norms the rate of B too, and LoRA
    embeddings a rate of their own.

    Args:
        params: a PEFT model, or its `named_parameters()` or param groups of such. Factors of a model become float32.
        lr: of every parameter but the lora_B, >= 0.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        lora_plus_ratio: learning rate of the lora_B over `lr`, >= 0.

    Raises:
        InputError: a value out of range, or nothing to train.
    """

    lr_scale = "the change of a factor's entry in one step"
    state_keys = frozenset({"step", "exp_avg", "exp_avg_sq"})
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "lora_plus_ratio": lora_plus_ratio,
        }
        super().__init__(params, defaults)

    def split(self, group: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        merged = {**defaults, **group}
        fast = [(name, parameter) for name, parameter in group["params"] if ".lora_B." in name]
        rest = [(name, parameter) for name, parameter in group["params"] if ".lora_B." not in name]
        groups = [
            {**merged, "params": rest, ON_FACTORS: False},
            {**merged, "params": fast, ON_FACTORS: True, "lr": merged["lr"] * merged["lora_plus_ratio"]},
        ]
        return [group for group in groups if group["params"]]

    def step_factors(self) -> None:
        for group in self.param_groups:
            if group[ON_FACTORS]:
                adamw_step(self, group)


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
    _renamed: ClassVar[dict[str, str]] = {"adamw_betas": "betas"}
    state_keys = frozenset({"step", "exp_avg", "exp_avg_sq", "momentum_buffer"})

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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn,
            "adamw_lr": adamw_lr,
            "betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        super().__init__(params, defaults)
        self._muon = torch.optim.Muon([{**group} for group in self.param_groups if group[ON_FACTORS]])

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raises InputError for an option out of range."""
        super().check_options(options)
        choices = (None, *get_args(LearningRateAdjustment))
        if options["adjust_lr_fn"] not in choices:
            raise InputError(
                f"adjust_lr_fn must be one of {', '.join(map(repr, choices))}, got {options['adjust_lr_fn']!r}"
            )

    def split(self, group: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        merged = {**defaults, **group}
        rates = {"lr": merged["adamw_lr"], "weight_decay": merged["adamw_weight_decay"], "eps": merged["adamw_eps"]}
        return split_factors(group, others=rates)

    def step_factors(self) -> None:
        # Its groups and state are ours, which loading a state_dict replaces.
        self._muon.param_groups = [self._muon.defaults | group for group in self.param_groups if group[ON_FACTORS]]
        self._muon.state = self.state
        self._muon.step()
