"""One run on a bed: an adapter on its layers, a short training loop, the held-out figures, and the measured rate."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from bed_models import Bed

from qriemann import locally_optimal_
from qriemann.optim.measured_rate import measure_rate
from qriemann.optim.methods import METHODS, resolve_options

_MEASURED_ROWS = 32
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Training:
    """The settings of one run.

    Attributes:
        method: of METHODS, with its `options`; `start` and `alpha` are among them, and two of the bed's own: `loi`, batches
            whose gradient informs the start, and `warmup`, steps over which the rate rises to `lr`.
        lr: the first one, which falls linearly to zero over `steps`; "auto" measures it, and 0 steps do no more.
        rank, scale: of the adapter, `scale` being lora_alpha / rank.
        seed: of the start and of the order of the rows.
    """

    method: str
    lr: float | str
    steps: int
    rank: int = 16
    scale: float = 1.0
    batch: int = 8
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def train(bed: Bed, run: Training, training: Sequence[int], held_out: Sequence[int]) -> dict[str, Any]:
    """Trains an adapter and takes it off again; returns the held-out figures, the rate and the seconds.

    Args:
        bed: with its rows.
        run: the settings.
        training, held_out: numbers of the bed's rows; the first are gone through again, in another order, as often as needed.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(run.seed)
    config = LoraConfig(
        r=run.rank, lora_alpha=run.scale * run.rank, lora_dropout=0.0, bias="none", target_modules=_TARGETS
    )
    adapted = get_peft_model(bed.tail, config)
    try:
        options = dict(run.options) | ({"lr": run.lr} if run.lr != "auto" else {})
        loi, warmup = options.pop("loi", 0), options.pop("warmup", 0)
        optimizer = METHODS[run.method].optimizer(adapted, **resolve_options(run.method, options))
        wall, cpu = time.perf_counter(), time.process_time()
        order = torch.Generator().manual_seed(run.seed)
        turns: list[int] = []
        measured_on = math.ceil(_MEASURED_ROWS / run.batch)
        count = max(run.steps, measured_on)
        while len(turns) < count * run.batch:
            turns += torch.randperm(len(training), generator=order).tolist()
        batches = [[training[turn] for turn in turns[i * run.batch :][: run.batch]] for i in range(count)]
        if loi:
            seen = [bed.batch(chosen) for chosen in batches[:loi]]
            locally_optimal_(
                adapted, seen, lambda _, batch: _loss(bed, batch), start=run.options["start"], seed=run.seed
            )
        measured = {}
        if run.lr == "auto":
            rate, changes = measure_rate(
                optimizer,
                [bed.batch(chosen) for chosen in batches[:measured_on]],
                lambda batch: _loss(bed, batch),
                lambda batch: bed.logits(batch).float().log_softmax(1),
            )
            measured = {"changes": changes}
            _set_rate(optimizer, rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        losses = []
        for step, chosen in enumerate(batches[: run.steps]):
            for group, first in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = first * min(1 - step / run.steps, (step + 1) / (warmup or 1))
            loss = _loss(bed, bed.batch(chosen))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        last = losses[-max(run.steps // 10, 1) :]
        return {
            **evaluate(bed, held_out),
            "rate": rates[0],
            **measured,
            "training_loss": sum(last) / len(last) if last else None,
            **{key: round(value, 1) for key, value in seconds.items()},
        }
    finally:
        adapted.unload()


@torch.no_grad()
def evaluate(bed: Bed, rows: Sequence[int], *, size: int = 32) -> dict[str, float]:
    """Loss a trained token, and the share of rows that greedy generation answers exactly.

    It does if and only if each target is the most likely token after those before it: one forward pass tells.
    """
    total, tokens, right = 0.0, 0, 0
    for start in range(0, len(rows), size):
        batch = bed.batch(rows[start : start + size])
        logits = bed.logits(batch)
        total += F.cross_entropy(logits, batch.targets, reduction="sum").item()
        tokens += len(batch.targets)
        wrong = batch.row[logits.argmax(1) != batch.targets]
        right += len(batch.states) - len(wrong.unique())
    return {"loss": total / tokens, "exact": right / len(rows)}


def _loss(bed: Bed, batch: Any) -> torch.Tensor:
    return F.cross_entropy(bed.logits(batch), batch.targets)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Makes `rate` that of the first param group; the others keep their ratio to it (LoRA+)."""
    first = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * rate / first
