"""The held-out loss of a run against the dense float64 model, at any batch size and under any training loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qriemann.config import settings_from
from qriemann.training.prepare import prepare
from qriemann.training.train import train

# Answers of 1 to 18 words: a mean over batches is far from the mean over tokens.
HELD = [
    {
        "messages": [
            {"role": "user", "content": f"say {n}"},
            {"role": "assistant", "content": " ".join(["word", "and"] * n)},
        ]
    }
    for n in (1, 9, 2, 7, 1, 5, 3)
]


@pytest.fixture
def settings(settings, write_rows):
    held = write_rows(HELD, "held.jsonl")
    return {
        **settings,
        "dataset_eval_name": str(held),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "eval_steps": 1,
    }


def dense_loss(base: Path, adapter: Path, rows) -> float:
    """Summed negative log likelihood over the number of counted tokens, row by row in float64."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).double().eval()
    total = count = 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.filterwarnings("ignore:.*packing.*:UserWarning", "ignore:.*attention implementation.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 3},
        {"per_device_eval_batch_size": 8, "train_sampling_strategy": "group_by_length"},
        {"label_smoothing_factor": 0.3, "per_device_eval_batch_size": 4},
        {"loss_type": "dft", "per_device_eval_batch_size": 4},
        {"packing": True, "max_length": 256, "per_device_eval_batch_size": 2},
    ],
    ids=lambda change: " ".join(map(str, change.values())),
)
def test_it_is_the_mean_over_all_tokens(settings, model_folder, change):
    prepared = prepare(settings_from({**settings, **change}))
    rows = prepared.data.held_out
    result = train(prepared)
    truth = dense_loss(model_folder, result.output_dir, rows)
    # Float32 against float64; a mean over batches is off by 1e-2.
    assert result.eval_loss == pytest.approx(truth, rel=1e-5)
    logged = [record for record in result.trainer.state.log_history if "eval_loss" in record]
    assert logged[-1]["eval_loss"] == pytest.approx(truth, rel=1e-5)
    assert 0 <= logged[-1]["eval_mean_token_accuracy"] <= 1
    assert 0 < logged[-1]["eval_entropy"] <= math.log(300)
