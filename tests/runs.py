"""Short runs of a stock SFTTrainer on a tiny Llama, and everything they end in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import SFTConfig, SFTTrainer

import qriemann
from qriemann.checkpoints.step_guard import StepGuard
from tests.models import WORDS, counting_rows, tiny_llama, trainer_settings, word_tokenizer


def uneven_rows(rows: int = 22) -> Dataset:
    """Rows of different lengths and contents: another order or another mask gives other gradients."""
    return Dataset.from_list(
        [{"text": " ".join(WORDS[(i * k) % 13] for k in range(1, 4 + i % 5))} for i in range(rows)]
    )


def protected_trainer(
    folder: Path,
    *,
    rows: Dataset | None = None,
    method: str = "riemannion",
    options: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    loi: bool = False,
    protection: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[SFTTrainer, StepGuard]:
    """A trainer as a user's script makes it, on two batches of 4 a step unless told otherwise."""
    defaults = {
        "gradient_accumulation_steps": 2,
        "activation_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "linear",
    }
    trainer = SFTTrainer(
        model=tiny_llama(layers=1),
        processing_class=word_tokenizer(),
        args=SFTConfig(**trainer_settings(folder, **{**defaults, **settings})),
        train_dataset=rows or uneven_rows(),
        eval_dataset=uneven_rows(3) if settings.get("eval_strategy", "no") != "no" else None,
        peft_config=LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **(lora or {})}),
        optimizer_cls_and_kwargs=qriemann.for_trainer(method, **(options or {})),
        callbacks=[qriemann.LocallyOptimalInit(2)] if loi else callbacks,
    )
    return trainer, qriemann.protect(trainer, **(protection or {}))


def sft_trainer(
    model: Any,
    folder: Path,
    start: str | None = None,
    *,
    lora: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    optimizer: Any = None,
    callbacks: list[Any] | None = None,
    **settings: Any,
) -> SFTTrainer:
    """A stock trainer with the two arguments of the README, four steps of four counting rows."""
    options = {"lr": 0.05, "start": start, **(method or {})}
    return SFTTrainer(
        model=model,
        processing_class=word_tokenizer(),
        args=SFTConfig(**trainer_settings(folder, **settings)),
        train_dataset=counting_rows(),
        eval_dataset=counting_rows(6),
        peft_config=LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **(lora or {})}),
        optimizer_cls_and_kwargs=optimizer or qriemann.for_trainer("riemannion", **options),
        callbacks=callbacks,
    )


def outcome(trainer: SFTTrainer) -> dict[str, Tensor]:
    """Every trained tensor, every tensor of the optimizer's state, and the learning rates."""
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": value.clone() for key, value in entry.items() if isinstance(value, Tensor)}
    found["rates"] = torch.tensor([group["lr"] for group in trainer.optimizer.param_groups], dtype=torch.float64)
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def logged(trainer: SFTTrainer, key: str = "loss") -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in trainer.state.log_history if key in record]
