"""Folders as a training and a merge leave them, small and made at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.models import fill_lora, tiny_llama, with_lora, word_tokenizer

SETTINGS = {
    "method": "riemannion",
    "learning_rate": 0.02,
    "max_steps": 5,
    "lora_r": 4,
    "lora_alpha": 8,
    "quantize": "nf4",
    "seed": 3,
    "display": "auto",
    "hub_token": "<redacted>",
}
LOSSES = [3.0, 2.5, 2.25, 1.5, 1.0]


def adapter_folder(folder: Path, *, base: str = "someone/base", **run: Any) -> Path:
    """What `qriemann train` leaves: PEFT's own files, its card included, a tokenizer and our records."""
    model = with_lora(tiny_llama())
    fill_lora(model)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    word_tokenizer().save_pretrained(folder)
    torch.save({"output_dir": str(folder)}, folder / "training_args.bin")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"state")
    records(folder, base=base, **run)
    return folder


def records(folder: Path, *, base: str = "someone/base", settings: dict[str, Any] | None = None, **run: Any) -> None:
    """run.json, metrics.jsonl, loss.png and trained_rows.json."""
    config = {**SETTINGS, "output_dir": str(folder), "model_name_or_path": base, **(settings or {})}
    content = {
        "started_at": "2026-01-02T03:04:05+00:00",
        "status": "finished",
        "written": ["model_name_or_path", "output_dir", "learning_rate", "max_steps", "dataset_name"],
        "data": {"fingerprint": "f" * 64, "train_rows": 40, "trained_tokens": 400, "held_out_rows": 10},
        "versions": {"qriemann": "0.1.0", "torch": "2.13.0"},
        "device": {"type": "cpu", "name": "x86_64"},
        "model": {"name_or_path": base, "parameters": 99},
        "config": config,
        "result": {"steps": 5, "train_loss": 1.0, "eval_loss_before": 3.5, "eval_loss": 1.25, "tokens_per_s": 71.0},
    }
    (folder / "run.json").write_text(json.dumps({**content, **run}))
    (folder / "trained_rows.json").write_text("{}")
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.5}]
    lines += [
        {"step": step, "loss": loss, "learning_rate": 0.02 / step, "tokens_per_s": 70.0 + step, "peak_gib": 1.5}
        for step, loss in enumerate(LOSSES, 1)
    ]
    lines.append({"step": 5, "eval_loss": 1.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n curve")


def merged_folder(folder: Path) -> Path:
    """What `qriemann merge` leaves: a plain model and its proof, no record of the training."""
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "merge_report.json").write_text(json.dumps(PROOF))
    return folder


def plain_adapter(folder: Path, a: torch.Tensor, b: torch.Tensor, **config: Any) -> Path:
    """An adapter of one layer with these factors."""
    folder.mkdir()
    save_file(
        {
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": a.contiguous(),
            "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": b.contiguous(),
        },
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": a.shape[0], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


PROOF = {
    "base": "someone/base",
    "prompts": {"source": "the built-in prompts", "rows": 32, "tokens": 900, "notices": []},
    "trained": {"loss": 1.5},
    "untrained_base": {"mean_kl": 0.7, "worst_kl": 9.0, "top_agreement": 0.55, "loss": 2.5, "recorded_loss": 1.5},
    "merged": [
        {
            "into": "nf4-dequantized",
            "dtype": "float32",
            "mean_kl": 3.25e-9,
            "worst_kl": 4e-7,
            "top_agreement": 1.0,
            "loss": 1.5,
            "accepted": True,
            "reasons": [],
        }
    ],
    "accepted": True,
    "prefer": {"into": "nf4-dequantized", "why": "prefer nf4-dequantized: it is what was trained on"},
    "conclusions": ["prefer nf4-dequantized: it is what was trained on"],
}
