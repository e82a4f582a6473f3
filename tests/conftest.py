"""Shared by all tests."""

from __future__ import annotations

import torch

# The tensors of most tests are tiny: with more threads they wait for each other longer than they compute.
torch.set_num_threads(1)
