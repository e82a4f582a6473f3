"""Data parallel: every process holds the whole 4-bit base and adapter, and takes the same step on the same summed blocks.

DDP averages the tangent blocks as it would any gradient. Every process repeats the step, the same arithmetic on the same
numbers, so factors and momentum stay equal to the bit. Sharing the step gains nothing: on 210 adapters of a 135M Llama, two
CPU processes would each save half of a step of 256 ms and spend 119 ms to exchange the new factors and momentum.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor

from qriemann.errors import InputError

# accelerate sets these in the environment of a launched process, and when a trainer gets a plugin.
_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (ZeRO)"}


def process_count() -> int:
    """The processes that train one model together."""
    return torch.distributed.get_world_size() if _together() else 1


def is_main_process() -> bool:
    """Whether this is the one process that writes and prints."""
    return not _together() or torch.distributed.get_rank() == 0


def refuse_sharding() -> None:
    """Raises InputError where accelerate was told to shard parameters among processes."""
    for variable, name in _SHARDING.items():
        if parse_flag_from_env(variable):
            raise InputError(
                f"{name} splits the factors, and a step needs both of a layer whole; use accelerate launch --multi_gpu"
            )


def run_on_main(work: Callable[[], Any]) -> None:
    """Does the work in the main process while the others wait; all of them raise its InputError."""
    refusal: list[str | None] = [None]
    if is_main_process():
        try:
            work()
        except InputError as error:
            refusal = [str(error)]
    if process_count() > 1:
        broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise InputError(refusal[0])


def wait_for_all() -> None:
    """Returns when every process has called it."""
    if process_count() > 1:
        torch.distributed.barrier()


def same_seed(seed: int | None) -> int | None:
    """The seed; without one, what the main process draws from torch's global generator."""
    if seed is not None or process_count() == 1:
        return seed
    drawn = [int(torch.randint(2**62, ()))]
    broadcast_object_list(drawn)
    return drawn[0]


def sum_over_processes(values: Tensor) -> Tensor:
    """The values summed over all processes, so that all of them decide alike."""
    if process_count() > 1:
        torch.distributed.all_reduce(values)
    return values


def largest_over_processes(number: int) -> int:
    """The largest of the processes' numbers."""
    return max(gather_object([number])) if process_count() > 1 else number


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
