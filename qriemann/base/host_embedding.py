"""Input embeddings whose matrix stays in host memory: rows are looked up there and sent to the model's device.

A step reads a few thousand of the matrix's hundred thousand rows and writes none; in an 8B Llama it would occupy 1.05 GB of
the card. The price is one copy of the rows (batch x length x width) and one wait for the token ids in each forward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qriemann.errors import InputError

_HOST = torch.device("cpu")


class HostEmbedding(nn.Module):
    """Mixed into the class of an embedding, so that whatever that class does with the rows it still does."""

    place: torch.device

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(input.to(_HOST), *args, **kwargs).to(self.place)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Accelerate and the Trainer call .to(device) on the model, which must not move the matrix.
        self.place = fn(torch.empty(0, device=self.place)).device
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype), recurse)


def has_tied_embeddings(model: Any) -> bool:
    """Whether the output head of a language model, with an adapter or without, is its embedding matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def refuse_tied_embeddings(model: PreTrainedModel, name: str) -> None:
    """Raises InputError if the output head of `model` is its embedding matrix."""
    if has_tied_embeddings(model):
        raise InputError(f"{name}: offload_embeddings must be false where the output head is the embedding matrix")


def keep_embeddings_on_host(model: PreTrainedModel, name: str) -> None:
    """Moves the input embeddings of `model` to host memory, for good; its output stays the same."""
    refuse_tied_embeddings(model, name)
    embeddings: Any = model.get_input_embeddings()
    place = embeddings.weight.device
    embeddings.to(_HOST)
    _mix_in(embeddings, HostEmbedding)
    embeddings.place = place
    _mix_in(model, _DeviceOfTheRest)


class _DeviceOfTheRest:
    """Without it transformers takes the first parameter's device for the model's, and that parameter is the embeddings'."""

    @property
    def device(self: Any) -> torch.device:
        return self.get_input_embeddings().place


def _mix_in(module: nn.Module, part: type) -> None:
    # The class keeps its name: transformers writes it into the configuration, and PEFT and the Trainer look it up.
    kind = type(module)
    module.__class__ = type(kind.__name__, (part, kind), {"__module__": kind.__module__})
