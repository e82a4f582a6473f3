"""Private parts of transformers' and TRL's trainers."""

import copy
from collections.abc import Callable
from typing import Any


def _attribute(name: str) -> Any:
    """A property that stands for a private attribute of the trainer."""

    def write(self: Any, value: Any) -> None:
        setattr(self.trainer, name, value)

    return property(lambda self: getattr(self.trainer, name), write)


class TrainerCounts:
    """What transformers' Trainer and TRL's trainers count in private attributes; tests/checkpoints/test_step_guard.py.

    Attributes:
        loss_sum: the tensor that losses are added to since the last log.
        last_logged_step, first_step: the step of the last log, and the one that the run began with.
    """

    loss_sum = _attribute("_tr_loss")
    total_loss = _attribute("_total_loss_scalar")
    last_logged_step = _attribute("_globalstep_last_logged")
    first_step = _attribute("_initial_global_step")
    batch_size = _attribute("_train_batch_size")

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @property
    def metrics(self) -> dict[str, list[float]]:
        """What a TRL trainer averages beside the loss until the next log; empty for other trainers."""
        return getattr(self.trainer, "_metrics", {}).get("train", {})

    @property
    def tokens(self) -> int:
        """The tokens that a TRL trainer has seen; 0 for other trainers."""
        return getattr(self.trainer, "_total_train_tokens", 0)

    @tokens.setter
    def tokens(self, count: int) -> None:
        if hasattr(self.trainer, "_total_train_tokens"):
            self.trainer._total_train_tokens = count

    def saved(self) -> Callable[[], None]:
        """A function that sets TRL's metrics and token count back to what they are now, as often as it is called."""
        names = ("_metrics", "_total_train_tokens")
        saved = {name: copy.deepcopy(vars(self.trainer)[name]) for name in names if name in vars(self.trainer)}
        return lambda: vars(self.trainer).update(copy.deepcopy(saved))

    def to_device(self, batch: Any) -> Any:
        """The batch on the trainer's device, as the trainer moves it."""
        return self.trainer._prepare_inputs(batch)


def token_sums(trainer: Any, model: Any, inputs: Any) -> Any:
    """Summed over the counted tokens of a batch: negative log likelihood, number, entropy and right predictions.

    They come from the head that TRL fuses with its loss, which never holds all logits; tests/training/test_held_out_loss.py
    """
    import torch

    inputs = trainer._prepare_inputs(inputs)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    parts = (-outputs.log_probs, outputs.label_mask, outputs.entropy, outputs.is_top1)
    return torch.stack([part.double().sum() for part in parts])


def take_one_gpu(args: Any) -> None:
    """Lets a process that no launcher started train on its first visible GPU, the device of the arguments, alone.

    transformers would wrap the model in `nn.DataParallel` for all of them, which TRL refuses. Ask for the arguments' device
    first. tests/test_device.py
    """
    args._n_gpu = min(args.n_gpu, 1)
