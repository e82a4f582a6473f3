"""The weights of a base model as mappings from a tensor's name to the tensor, read or computed when asked for."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from qriemann.adapters.saved_config import refuse_outside
from qriemann.base.gguf import EMBEDDED_MODEL
from qriemann.base.load import load_base
from qriemann.errors import InputError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors checkpoint, in the order of its files; only one file is mapped at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / _INDEX).is_file():
            files = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"]
            for name, file in files.items():
                refuse_outside(folder / _INDEX, name, file, "download it again")
            self._files = dict(sorted(files.items(), key=lambda item: item[1]))
        elif (folder / _SINGLE).is_file():
            with safe_open(folder / _SINGLE, "pt") as file:
                self._files = dict.fromkeys(file.keys(), _SINGLE)
        else:
            raise InputError(
                f"the base must be stored as safetensors, got {folder} without {_SINGLE} or its index; load it with "
                "transformers and save it with save_pretrained"
            )
        self._opened: tuple[str, Any] | None = None

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        if self._opened is None or self._opened[0] != file:
            self._opened = (file, safe_open(self.folder / file, "pt"))
        return self._opened[1].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def close(self) -> None:
        """Unmaps the file, whose pages count as memory of this process while it is mapped."""
        self._opened = None


class Dequantized(Mapping[str, Tensor]):
    """The float weights that a 4-bit model computes with. Take it before PEFT renames the model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **_persistent_buffers(model)}

    def __getitem__(self, name: str) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        tensor = self._tensors[name]
        state = getattr(tensor, "quant_state", None)
        return tensor.detach() if state is None else dequantize_4bit(tensor.data, state)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def original_weights(base: str, revision: str | None = None) -> Mapping[str, Tensor]:
    """The weights of a base before any quantization of ours.

    Args:
        base: as `load_base` takes it. A GGUF file is dequantized to float32 in memory; anything else is read lazily.
        revision: of a Hub model.

    Raises:
        InputError: the base is stored in 4 bit, or not as safetensors.
    """
    path = Path(base).expanduser()
    if base == EMBEDDED_MODEL or path.is_file():
        model, _ = load_base(base, quantize=None, dtype="float32")
        return {name: tensor.detach() for name, tensor in model.named_parameters()} | _persistent_buffers(model)
    folder = path if path.is_dir() else _download(base, revision)
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        raise InputError(
            f"the base must be stored unquantized for this, got {base!r}, which is quantized; name the original model with "
            "--base, or merge into nf4-dequantized"
        )
    return Checkpoint(folder)


@functools.cache
def _download(base: str, revision: str | None) -> Path:
    # After load_base has read the same repository, this finds it in the cache.
    try:
        return Path(
            snapshot_download(
                base,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors"],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except (OSError, ValueError) as error:  # among them every error of the Hub's client
        raise InputError(
            f"the base must be a local folder, a .gguf file or on the Hub, got {base!r}: {str(error).splitlines()[0]}; name "
            "another with --base"
        ) from error


def tensor_names(modules: Iterable[str], weights: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """Tensor name of each module's weight; some checkpoints leave out the first part of a name.

    Raises:
        InputError: naming the first module that the weights lack.
    """
    names = {}
    for module in modules:
        full = f"{module}.weight"
        short = full.removeprefix(f"{prefix}.")
        if full not in weights and short not in weights:
            raise InputError(
                f"the base's checkpoint must have the weight of every layer of the adapter, got none named {full}; merge "
                "into nf4-dequantized, which reads the loaded model"
            )
        names[module] = full if full in weights else short
    return names


def quantized_like(weight: Tensor, layer: Any) -> Any:
    """The weight in 4 bit with the settings of a bitsandbytes layer, on that layer's device."""
    from bitsandbytes.nn import Params4bit

    state = layer.weight.quant_state
    return Params4bit(
        weight.contiguous().cpu(),
        requires_grad=False,
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_storage=layer.weight.quant_storage,
    ).to(layer.weight.device)


def stored_4bit(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The float32 value of a tensor that transformers saved in bitsandbytes' 4-bit format."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {key.removeprefix(f"{name}."): weights[key] for key in weights if key.startswith(f"{name}.")}
    return dequantize_4bit(weights[name], QuantState.from_dict(parts, device=torch.device("cpu"))).float()
