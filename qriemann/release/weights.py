"""The weights of a model as mappings from a tensor's name to the tensor, and as files.

torch is imported when a tensor is read or written: `inspect` looks for a base that may not be there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open

from qriemann.adapters.saved_config import refuse_outside
from qriemann.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint(Mapping[str, "Tensor"]):
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
                f"{folder} has neither {_SINGLE} nor its index; load the base with transformers and save it with "
                "save_pretrained"
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


class Untied(Mapping[str, "Tensor"]):
    """The weights of a model with tied embeddings, and its output head beside them under a name of its own."""

    def __init__(self, weights: Mapping[str, Tensor], head: str, embeddings: str) -> None:
        self._weights, self._head, self._embeddings = weights, head, embeddings

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._embeddings if name == self._head else name]

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._weights if name != self._head)
        yield self._head

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Renamed(Mapping[str, "Tensor"]):
    """Weights under the names that a model has for them, and what the checkpoint has in another form as it was loaded."""

    def __init__(
        self, weights: Mapping[str, Tensor], stored_as: Mapping[str, str], loaded: Mapping[str, Tensor]
    ) -> None:
        self._weights, self._stored_as, self._loaded = weights, stored_as, loaded

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._stored_as[name]] if name in self._stored_as else self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)


def write_checkpoint(
    folder: Path, like: Mapping[str, Tensor], tensor_of: Callable[[str], Tensor], shard_bytes: int
) -> None:
    """Writes tensors into the safetensors files that transformers looks for; no more than one file is in memory.

    Args:
        folder: exists.
        like: shape and dtype of each tensor, on the meta device.
        tensor_of: the tensor of a name.
        shard_bytes: upper bound of a file, unless one tensor alone is larger.
    """
    from safetensors.torch import save_file

    plan = split_torch_state_dict_into_shards(dict(like), max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        save_file(
            {name: tensor_of(name).cpu().contiguous() for name in names}, folder / file, metadata={"format": "pt"}
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def original_weights(base: str, revision: str | None = None) -> Mapping[str, Tensor]:
    """The weights of a base before any quantization of ours.

    Args:
        base: as `load_base` takes it. A GGUF file is dequantized to float32 in host memory; anything else is read lazily.
        revision: of a Hub model.

    Raises:
        InputError: the base is stored in 4 bit, or not as safetensors.
    """
    path = Path(base).expanduser()
    if _is_gguf(base):
        from qriemann.base.load import load_base
        from qriemann.evaluation.trained import Dequantized

        return Dequantized(load_base(base, quantize=None, dtype="float32", device="cpu")[0])
    folder = path if path.is_dir() else _download(base, revision)
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        raise InputError(
            f"the base {base!r} is stored quantized; name the original model with --base, or merge into nf4-dequantized"
        )
    return Checkpoint(folder)


def _is_gguf(base: str) -> bool:
    path = Path(base).expanduser()
    if path.is_dir() or "/" in base:
        return path.is_file()
    # Late: it imports transformers, which a folder's tensors can do without.
    from qriemann.base.gguf import resolve_gguf

    return resolve_gguf(base) is not None


@functools.cache
def _download(base: str, revision: str | None) -> Path:
    # After load_base has read the same repository, this finds it in the cache.
    try:
        wanted, not_wanted = ["*.json", "*.safetensors"], ["*/*", "consolidated*"]
        return Path(snapshot_download(base, revision=revision, allow_patterns=wanted, ignore_patterns=not_wanted))
    except (OSError, ValueError) as error:  # among them every error of the Hub's client
        raise InputError(
            f"the base {base!r} is neither a local folder nor a .gguf file, and cannot be had from the Hub: "
            f"{str(error).splitlines()[0]}; name another with --base"
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
                f"the base's checkpoint has no tensor {full}, which the adapter changes; merge into nf4-dequantized, which "
                "reads the loaded model"
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
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {key.removeprefix(f"{name}."): weights[key] for key in weights if key.startswith(f"{name}.")}
    return dequantize_4bit(weights[name], QuantState.from_dict(parts, device=torch.device("cpu"))).float()
