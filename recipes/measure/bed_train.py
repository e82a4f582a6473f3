"""One run on a bed: an adapter on its layers, a short training loop, the held-out figures, and the measured rate."""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from bed_models import Batch, Bed

from qriemann.errors import InputError
from qriemann.optim.methods import METHODS, resolve_options

#: Mean KL a trained token, in nats, that the first step makes at the measured rate.
CHANGE = 0.3
_MEASURED_BATCHES = 4
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Training:
    """The settings of one run.

    Attributes:
        method: of METHODS, with its `options`; `start` and `alpha` are among them.
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
        given = {"lr": run.lr} if run.lr != "auto" else {}
        optimizer = METHODS[run.method].optimizer(adapted, **resolve_options(run.method, {**run.options, **given}))
        wall, cpu = time.perf_counter(), time.process_time()
        order = torch.Generator().manual_seed(run.seed)
        turns: list[int] = []
        count = max(run.steps, _MEASURED_BATCHES)
        while len(turns) < count * run.batch:
            turns += torch.randperm(len(training), generator=order).tolist()
        batches = [[training[turn] for turn in turns[i * run.batch :][: run.batch]] for i in range(count)]
        measured = {}
        if run.lr == "auto":
            rate, changes = measured_rate(bed, optimizer, [bed.batch(chosen) for chosen in batches[:_MEASURED_BATCHES]])
            measured = {"changes": changes}
            _set_rate(optimizer, rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        losses = []
        for step, chosen in enumerate(batches[: run.steps]):
            for group, first in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = first * (1 - step / run.steps)
            batch = bed.batch(chosen)
            loss = F.cross_entropy(bed.logits(batch), batch.targets)
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


def measured_rate(
    bed: Bed, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], *, change: float = CHANGE
) -> tuple[float, list[list[float]]]:
    """The learning rate whose first step changes the model's answers by `change`, and the (rate, change) pairs tried.

    The change is the mean KL, in nats a trained token, from the model before the step to the one after it, along the
    gradient of `batches` and on them. It grows about as the square of the rate; the rate is found in at most four tries of
    one forward pass, by the secant of the logarithms. Model and optimizer are left as they were.
    """
    optimizer.zero_grad()
    before = []
    for batch in batches:
        logits = bed.logits(batch)
        (F.cross_entropy(logits, batch.targets) / len(batches)).backward()
        before.append(logits.detach().log_softmax(1))
    saved = copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def changed(rate: float) -> float:
        _set_rate(optimizer, rate)
        optimizer.step()
        total = sum(
            F.kl_div(bed.logits(batch).log_softmax(1), old, reduction="sum", log_target=True).item()
            for batch, old in zip(batches, before, strict=True)
        )
        optimizer.load_state_dict(copy.deepcopy(saved))
        return total / sum(len(batch.targets) for batch in batches)

    rate, slope, tried = optimizer.param_groups[0]["lr"], 2.0, []
    for _ in range(4):
        tried.append([rate, changed(rate)])
        if len(tried) > 1:
            (x, fx), (y, fy) = tried[-2:]
            # Far beyond the wanted change the answers saturate, and two tries may agree.
            slope = min(max(math.log(fy / fx) / math.log(y / x), 0.5), 4.0)
        step = (change / tried[-1][1]) ** (1 / slope)
        rate = rate * min(max(step, 1e-2), 1e2)
        if abs(math.log(step)) < 0.05:
            break
    optimizer.zero_grad()
    if max(made for _, made in tried) < change / 2:
        largest = max(rate for rate, _ in tried)
        raise InputError(
            f"lr must be a number here, got auto: no rate up to {largest:.2g} changes the answers by {change} nats"
        )
    return float(f"{rate:.3g}"), tried


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Makes `rate` that of the first param group; the others keep their ratio to it (LoRA+)."""
    first = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * rate / first
