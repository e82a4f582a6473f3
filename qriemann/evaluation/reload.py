"""How far a model is from recorded logits; run as a script, it loads the model in a process of its own.

The script must not import this project, so that it loads what anybody else would load.
"""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

# Logits of one batch in memory at most, unless one row alone has more.
_BATCH_BYTES = 2**28


class ScoredRow(TypedDict):
    """Tokens of a row, the positions whose next token counts, and these next tokens."""

    ids: list[int]
    positions: list[int]
    targets: list[int]


class Differences(TypedDict):
    """A model against the recorded one, over all counted tokens of all rows.

    mean_kl, worst_kl: KL(recorded || model), nats a token. top_agreement: share of tokens with the same most likely one.
    loss: mean negative log likelihood of the rows' own tokens, nats. recorded_loss: the recorded model's.
    """

    mean_kl: float
    worst_kl: float
    top_agreement: float
    loss: float
    recorded_loss: float
    tokens: int


def logits_of_rows(model: Any, rows: list[ScoredRow]) -> Iterator[tuple[int, Tensor]]:
    """The index of each row and its float32 logits at the counted positions, rows of like length in one batch."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["ids"]))
    vocabulary = model.get_output_embeddings().weight.shape[0]
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(rows[order[stop]]["ids"]) * vocabulary * 4 <= _BATCH_BYTES:
            stop += 1
        batch = [rows[index] for index in order[start:stop]]
        longest = len(batch[-1]["ids"])
        ids = torch.tensor([row["ids"] + [0] * (longest - len(row["ids"])) for row in batch], device=model.device)
        # On the right, so that no counted token sees the padding.
        mask = torch.tensor([[int(i < len(row["ids"])) for i in range(longest)] for row in batch], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits
        for index, row, found in zip(order[start:stop], batch, logits, strict=True):
            yield index, found[row["positions"]].float().cpu()
        start = stop


def differences(model: Any, rows: list[ScoredRow], recorded: Path) -> Differences:
    """The model against the logits that the file has under each row's index."""
    divergences, agreements, losses, recorded_losses = [], [], [], []
    with safe_open(recorded, "pt") as file:
        for index, logits in logits_of_rows(model, rows):
            reference = file.get_tensor(str(index))
            targets = torch.tensor(rows[index]["targets"])
            # In float64: the divergence of nearly equal distributions is lost in float32's rounding.
            log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            agreements.append((reference.argmax(-1) == logits.argmax(-1)).double())
            losses.append(F.nll_loss(log_q, targets, reduction="none"))
            recorded_losses.append(F.nll_loss(log_p, targets, reduction="none"))
    return summarize(divergences, agreements, losses, recorded_losses)


def summarize(
    divergences: list[Tensor], agreements: list[Tensor], losses: list[Tensor], recorded_losses: list[Tensor]
) -> Differences:
    """The figures of all rows, from those of each row's counted tokens."""
    divergence = torch.cat(divergences)
    return Differences(
        mean_kl=divergence.mean().item(),
        worst_kl=divergence.max().item(),
        top_agreement=torch.cat(agreements).mean().item(),
        loss=torch.cat(losses).mean().item(),
        recorded_loss=torch.cat(recorded_losses).mean().item(),
        tokens=divergence.numel(),
    )


def load_and_compare(folder: str, dtype: str, device: str, request: dict[str, Any]) -> dict[str, Any]:
    """The differences of the model in the folder, or under `failure` why it does not load as it should."""
    try:
        return _load_and_compare(folder, dtype, device, request)
    except torch.OutOfMemoryError:
        if device == "cpu":
            raise
    # Not in the handler: the exception keeps what was on the card alive.
    gc.collect()
    torch.cuda.empty_cache()
    return _load_and_compare(folder, dtype, "cpu", request)


def _load_and_compare(folder: str, dtype: str, device: str, request: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map={"": device}, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever is wrong with the files, it is a finding
        return {"failure": f"it does not load: {type(error).__name__}: {str(error).splitlines()[0]}"}
    for kind, names in report.items():
        if names:
            return {"failure": f"it loads with {kind.replace('_', ' ')}: {', '.join(sorted(map(str, names))[:3])}"}
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack it for inference on some CPUs, with its scales rounded to bfloat16.
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype, layer.compute_type_is_set = getattr(torch, dtype), True
    return {**differences(model.eval(), request["rows"], Path(request["recorded"]))}


def main(request_path: str) -> None:
    """Compares each folder that the request names, one after the other, and writes what it found."""
    request = json.loads(Path(request_path).read_text("utf-8"))
    results = [load_and_compare(folder, dtype, device, request) for folder, dtype, device in request["models"]]
    Path(request["result"]).write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
