"""A CUDA device that is not there: tensors that compute on the CPU and say, to torch and to everyone, that they lie on it.

What a card would refuse is refused: an operation on tensors of two devices. What it would make wait is counted: a value read
on the host, an operation whose result's shape depends on values, a copy between the devices. So are the kernels.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from qriemann.geometry.parameter import CountedWrites

CUDA = torch.device("cuda", 0)

# Operations that no kernel is launched for.
_VIEWS = set(
    re.findall(
        r"\w+",
        "view _unsafe_view reshape _reshape_alias t transpose permute slice select unsqueeze squeeze expand detach alias "
        "split split_with_sizes unbind diagonal as_strided unfold lift_fresh empty empty_like empty_strided new_empty "
        "new_empty_strided is_pinned",
    )
)
# Operations that read their result, or its shape, on the host.
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_unique2", "unique_dim"}
# The largest matrix that cuSOLVER decomposes in a batch.
_BATCHED_SVD = 32


class OnCuda(CountedWrites, Tensor):
    """A tensor on the CPU that says that it lies on a CUDA device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = CUDA  # type: ignore[assignment]
    is_cuda, is_cpu = True, False  # type: ignore[assignment]

    @staticmethod
    def of(tensor: Tensor) -> OnCuda:
        return Tensor._make_subclass(OnCuda, tensor)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        kept = self if dtype is None or dtype == self.dtype else Tensor.to(self, dtype)
        return kept.cpu() if device is not None and device.type == "cpu" else kept

    def cpu(self) -> Tensor:
        return _read_on_the_host(self)

    def numpy(self) -> Any:
        raise TypeError("a CUDA tensor has no NumPy array")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Only what autograd calls past a mode.
        return PretendedCuda().__torch_dispatch__(function, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, object]) -> OnCuda:
        memo[id(self)] = copied = OnCuda.of(self.detach().clone()).requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        return copied


@torch.library.custom_op("pretended::read_on_the_host", mutates_args=())
def _read_on_the_host(tensor: Tensor) -> Tensor:
    return tensor.clone()


class PretendedCuda(TorchDispatchMode):
    """Computes on the CPU what is asked of the device, and counts.

    Attributes:
        kernels: how many, by operation.
        waits: how often the host waits for the device, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()

    def clear(self) -> None:
        self.kernels.clear()
        self.waits.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, dict(kwargs or {})
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        # Autograd casts a gradient to the device that it sees; a copy to the host is `read_on_the_host`.
        stays = device is None or (name == "_to_copy" and bool(there))
        on_cuda = bool(there) if stays else device.type == "cuda"
        if name == "read_on_the_host":
            self.waits["a copy to the host"] += 1
            on_cuda = False
        elif name in ("_to_copy", "copy_") and len({isinstance(tensor, OnCuda) for tensor in tensors} | {on_cuda}) > 1:
            # From memory that is not pinned.
            self.waits["a copy between the devices"] += 1
        elif there:
            strangers = [tensor for tensor in tensors if not isinstance(tensor, OnCuda) and tensor.dim() > 0]
            if strangers:
                raise AssertionError(f"{function} got tensors of two devices: {[(type(t), t.shape) for t in tensors]}")
            by_mask = name.startswith(("index", "_index")) and any(
                tensor.dtype == torch.bool for tensor in tree_iter(args[1]) if isinstance(tensor, Tensor)
            )
            if name in _WAITS or by_mask:
                self.waits[name] += 1
            if name == "_linalg_svd" and args[0].shape[:-2].numel() > 1 and args[0].shape[-1] > _BATCHED_SVD:
                raise AssertionError(f"matrices of {args[0].shape} would be decomposed one by one")
        if on_cuda and name not in _VIEWS:
            self.kernels[name] += 1
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        with torch._C._DisableTorchDispatch():
            if function is torch.ops.aten.mm.dtype:  # CUDA's alone
                result = args[0].to(args[2]) @ args[1].to(args[2])
            else:
                result = function(*args, **kwargs)
        if not on_cuda:
            return result
        return tree_map(lambda value: OnCuda.of(value) if type(value) is Tensor else value, result)


def move(model: nn.Module) -> None:
    """What `model.to("cuda")` does."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnCuda.of(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else OnCuda.of(buffer)


@contextmanager
def autocast() -> Iterator[None]:
    """What torch.autocast("cuda", torch.bfloat16) does; torch itself sees the CPU."""
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", torch.bfloat16):
        yield


@contextmanager
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    """Within the block, tensors can be made and moved to "cuda:0"."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    # As under FakeTensorMode: torch.tensor(..., device=...) makes its tensor on the CPU, and then moves it.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with PretendedCuda() as counts:
            yield counts
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
