"""Locally optimal initialization inside a stock trainer: a callback that moves every point before the first step."""

import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import TrainerControl, TrainerState

from qriemann.adapters.loi import check_options, locally_optimal_, preserved_rng
from qriemann.errors import InputError
from qriemann.geometry.parameter import fixed_rank_parameters
from qriemann.memory.auto_batch import rows_at_once
from qriemann.training.sample import draw_batches, lean_loss
from qriemann.training.seam import FixedRankCallback

_NAME = "locally optimal initialization"


class LocallyOptimalInit(FixedRankCallback):
    """Starts the adapter where its tangent space holds the leading directions of the gradient; see `locally_optimal_`.

    The batches are a sample of the trainer's data, drawn beside its dataloader: the order of the training that follows and
    all random generators are those of a run without it. A resumed run has its start already, so there it does nothing.

    Args:
        batches: training batches of the device's size to look at, >= 1.
        oversampling, power_iterations: as in `locally_optimal_`.
        seed: of the sample and the sketch; None takes the trainer's.
        loss_fn: called with (model, batch); None takes the loss the model returns. Trainers whose batches have no labels
            (DPO, GRPO) need one.

    Raises:
        InputError: a value out of range. When training begins: as `locally_optimal_`, for more batches than there are, and
            for an adapter that is not on the manifold.
    """

    def __init__(
        self,
        batches: int = 8,
        *,
        oversampling: int = 16,
        power_iterations: int = 1,
        seed: int | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise InputError(f"batches must be an integer >= 1, got {batches!r}")
        check_options("zero", 1.0, oversampling, power_iterations, seed or 0)
        self._batches, self._seed, self._loss_fn = batches, seed, loss_fn
        self._options: dict[str, Any] = {"oversampling": oversampling, "power_iterations": power_iterations}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Progress goes where the trainer's own does.
        console = Console(stderr=True, quiet=not state.is_world_process_zero, soft_wrap=True)
        model = kwargs["model"]
        points = fixed_rank_parameters(model.parameters())
        if state.global_step > 0:
            console.print(f"{_NAME} is skipped: the run resumes at step {state.global_step} from its own start")
            return
        if not points:
            raise InputError(
                f"{_NAME} needs an adapter on the manifold, as qriemann.for_trainer('riemannion') makes it"
            )
        seed = args.seed if self._seed is None else self._seed
        with preserved_rng():
            size = rows_at_once(args, state)
            batches = draw_batches(kwargs["train_dataloader"], self._batches, size, seed + args.process_index)
        if 0 < len(batches) < self._batches:
            raise InputError(f"batches must be at most the data's {len(batches)} of {size} rows, got {self._batches}")
        passes = 2 * (self._options["power_iterations"] + 1)
        console.print(f"{_NAME}: {passes} passes over {self._batches} batches")
        started = time.perf_counter()
        # At an offset start S = alpha I; a zero start has no scale.
        alpha = next((point.s[0, 0].item() for point in points if point.offset is not None), None)

        def show(done: int, total: int) -> None:
            if done % len(batches) == 0 and done < total:
                console.print(f"{_NAME}: pass {done // len(batches)} of {passes} done")

        locally_optimal_(
            model,
            batches,
            self._loss_fn or lean_loss,
            start="zero" if alpha is None else "offset",
            alpha=alpha or 1.0,
            **self._options,
            seed=seed,
            progress=show,
        )
        console.print(f"{_NAME}: done in {time.perf_counter() - started:.0f} s")


def recipe_callbacks(init: str, options: Mapping[str, Any] | None) -> list[LocallyOptimalInit]:
    """The callbacks that a recipe's `init` stands for, with its `init_kwargs`."""
    if init != "loi":
        if options:
            raise InputError(f"init_kwargs must be left out without init: loi, got {dict(options)!r}; add init: loi")
        return []
    known = [key for key in inspect.signature(LocallyOptimalInit).parameters if key != "loss_fn"]
    for key in options or ():
        if key not in known:
            raise InputError(f"init_kwargs must be among {', '.join(known)}, got {key!r}")
    return [LocallyOptimalInit(**(options or {}))]
