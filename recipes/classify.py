"""Any method on a model that is not a chat model: `python recipes/classify.py --method scaled-adamw`.

A small vision transformer with random frozen weights learns to recognize the direction of waves in noisy images, which a
formula generates. It uses stock `transformers.Trainer` and stock PEFT: the adapter is on the linear layers of attention and
MLP, and the classifier is trained beside it (`modules_to_save`). A wave's phase is random, so no single pixel is informative.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import qriemann
from qriemann.optim.methods import METHODS, find_method
from qriemann.reporting import reporting

_SIZE, _DIRECTIONS = 24, 8
_TRAIN_IMAGES, _TEST_IMAGES = 2048, 512
_NOISE = 0.5
_BATCH = 32


@dataclass(frozen=True)
class Accuracy:
    """Shares of the test images classified correctly."""

    before: float
    after: float


def make_images(count: int, seed: int) -> TensorDataset:
    """Images (count, 1, 24, 24) of plane waves in noise, each labelled with one of 8 directions."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randint(_DIRECTIONS, (count,), generator=generator)
    phase, frequency = torch.rand(2, count, generator=generator)
    y, x = torch.meshgrid(*2 * [torch.arange(_SIZE) / _SIZE], indexing="ij")
    angle = math.pi * direction / _DIRECTIONS
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    waves = torch.sin(2 * math.pi * ((2 + 2 * frequency)[:, None, None] * along + phase[:, None, None]))
    noise = _NOISE * torch.randn(count, _SIZE, _SIZE, generator=generator)
    return TensorDataset((waves + noise)[:, None], direction)


def make_model(seed: int) -> PeftModel:
    """A vision transformer of 80,000 random weights, with a LoRA adapter of rank 8 on its linear layers."""
    set_seed(seed)
    config = ViTConfig(
        image_size=_SIZE,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=_DIRECTIONS,
        initializer_range=0.15,
    )
    adapter = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", modules_to_save=["classifier"])
    return get_peft_model(ViTForImageClassification(config), adapter)


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def classify(method: str, *, lr: float | None = None, steps: int = 120, seed: int = 0) -> Accuracy:
    """The accuracy on test images before and after training with a method of `qriemann.for_trainer`.

    Args:
        lr: None takes 10 times the method's default: the defaults are for pretrained models and long runs.
    """
    lr = 10 * find_method(method).defaults["lr"].value if lr is None else lr
    optimizer = qriemann.for_trainer(method, lr=lr)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=make_model(seed),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=_BATCH,
                per_device_eval_batch_size=_TEST_IMAGES,
                warmup_steps=0.1,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            ),
            train_dataset=make_images(_TRAIN_IMAGES, seed),
            eval_dataset=make_images(_TEST_IMAGES, seed + 1),
            data_collator=collate,
            compute_metrics=share_right,
            optimizer_cls_and_kwargs=optimizer,
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        return Accuracy(before, trainer.evaluate()["eval_accuracy"])


def share_right(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="classify.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", default="riemannion", help=f"{', '.join(METHODS)} (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="on the method's scale (default: 10 times the method's default)")
    parser.add_argument("--steps", type=int, default=120, help="of 32 images each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 2 for bad input, which one line names."""
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    def run() -> int:
        shares = classify(options.method, lr=options.lr, steps=options.steps, seed=options.seed)
        print(
            f"{options.method}: {shares.before:.0%} of {_TEST_IMAGES} test images correct before, {shares.after:.0%} after"
        )
        return 0

    return reporting(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
