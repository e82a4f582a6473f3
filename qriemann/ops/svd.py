"""The singular value decomposition of a batch of small matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# cuSOLVER decomposes a batch of matrices up to this size in one call. Above, torch calls it matrix by matrix, and waits for
# the device each time.
_BATCHED_ON_CUDA = 32


def svd(y: Float[Tensor, "b p p"]) -> tuple[Float[Tensor, "b p p"], Float[Tensor, "b p"], Float[Tensor, "b p p"]]:
    """L, sigma, R^T as torch.linalg.svd's; on the CPU, for one copy each way, where CUDA would take them one by one."""
    if y.is_cuda and y.shape[-1] > _BATCHED_ON_CUDA:
        left, sigma, right = torch.linalg.svd(y.cpu())
        return left.to(y.device), sigma.to(y.device), right.to(y.device)
    return torch.linalg.svd(y)
