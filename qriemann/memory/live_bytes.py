"""Counts the bytes that a computation allocates, on real tensors and on tensors without content alike."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qriemann.device import GIB

# Assumed: the CUDA context with the loaded kernels and cuBLAS' workspace, as current drivers report it for small programs.
CONTEXT = int(0.5 * GIB)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations allocate while it is active.

    `peaks` has for each window the bytes at its peak, by the part of the model that allocated them. Storages count under the
    present `part`, and the peak under the present `window`.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.part = self.window = ""
        self.peaks: dict[str, Counter[str]] = {}
        self._highest: Counter[str] = Counter()
        self._parts: Counter[str] = Counter()
        # Tensors that existed before do not count; holding them keeps their addresses from being used again.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen = {storage._cdata for storage in self._known}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size, part = storage._cdata, storage.nbytes(), self.part
        if address in self._seen:
            return
        self._seen.add(address)
        self._parts[part] += size
        self.live += size
        self._alive[address] = weakref.ref(storage, lambda _: self._forget(address, size, part))
        if self.live > self._highest[self.window]:
            self._highest[self.window] = self.live
            self.peaks[self.window] = self._parts.copy()

    def _forget(self, address: int, size: int, part: str) -> None:
        del self._alive[address]
        self._seen.remove(address)
        self._parts[part] -= size
        self.live -= size


@contextmanager
def count_peak(model: nn.Module, device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function that returns, after the block, the most bytes allocated at once in it beyond what was held."""
    if device.type != "cuda":
        # Resident memory would not tell: the C library keeps what was freed for later allocations of the same size.
        with LiveBytes(held_tensors(model)) as counter:
            yield lambda: sum(counter.peaks.get("", Counter()).values())
        return
    held, peak = torch.cuda.memory_allocated(device), 0
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield lambda: peak
    finally:
        peak = torch.cuda.max_memory_allocated(device) - held
        # The run reports its own peak, not that of batches which were too large.
        torch.cuda.reset_peak_memory_stats(device)


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Everything that a model and its adapters hold."""
    return [*model.parameters(), *model.buffers(), *adapter_tensors(model)]


def adapter_tensors(model: nn.Module) -> list[Tensor]:
    """What adapters hold outside their parameters: cores and frozen offsets."""
    variants = [v for module in model.modules() for v in getattr(module, "lora_variant", {}).values()]
    return [tensor for v in variants for tensor in (v.point.s, *(v.point.offset or ()))]


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the distinct tensors."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def card_bytes(device: torch.device) -> int:
    """The most bytes of a GPU that this process has held at once, with torch's reserve and the CUDA context."""
    return torch.cuda.max_memory_reserved(device) + CONTEXT
