"""The weights of a model, read from its files and written to them."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qriemann.base import EMBEDDED_MODEL
from qriemann.base.tensors import Tensors
from qriemann.errors import InputError, first_line
from qriemann.folder.files import refuse_outside

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_checkpoint(folder: Path) -> Tensors:
    """The tensors of a safetensors checkpoint; a file is mapped while a tensor of it is in use."""
    if (folder / _INDEX).is_file():
        files = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"]
        for name, file in files.items():
            refuse_outside(folder / _INDEX, name, file, "download it again")
    elif (folder / _SINGLE).is_file():
        with safe_open(folder / _SINGLE, "pt") as file:
            files = dict.fromkeys(file.keys(), _SINGLE)
    else:
        raise InputError(f"{folder} has neither {_SINGLE} nor its index; save the base again with save_pretrained")

    def read(name: str) -> Tensor:
        with safe_open(folder / files[name], "pt") as file:
            return file.get_tensor(name)

    return Tensors(files, read)


def write_checkpoint(
    folder: Path, like: Mapping[str, Tensor], tensors_of: Callable[[str], dict[str, Tensor]], shard_bytes: int
) -> None:
    """Writes tensors into the safetensors files that transformers looks for; no more than one file is in memory.

    Args:
        like: shape and dtype of each tensor, on the meta device.
        tensors_of: what the file holds for a name: the tensor, or the parts of a 4-bit one.
    """
    plan = split_torch_state_dict_into_shards(dict(like), max_shard_size=shard_bytes)
    files: dict[str, str] = {}
    for file, names in plan.filename_to_tensors.items():
        tensors = {key: part.cpu().contiguous() for name in names for key, part in tensors_of(name).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": files}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def original_weights(base: str, revision: str | None = None) -> Tensors:
    """The weights of a base that `load_base` takes, not quantized; those of a GGUF file as float32 in host memory."""
    path = Path(base).expanduser()
    if base == EMBEDDED_MODEL or path.is_file():
        from qriemann.adapters.attach import load_base
        from qriemann.evaluation.trained import dequantized_weights

        return dequantized_weights(load_base(base, quantize=None, dtype="float32", device="cpu")[0])
    folder = path if path.is_dir() else _download(base, revision)
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        raise InputError(
            f"the base {base!r} is stored quantized; name the original with --base, or merge into nf4-dequantized"
        )
    return read_checkpoint(folder)


@functools.cache
def _download(base: str, revision: str | None) -> Path:
    # After load_base has read the same repository, this finds it in the cache.
    try:
        wanted, not_wanted = ["*.json", "*.safetensors"], ["*/*", "consolidated*"]
        return Path(snapshot_download(base, revision=revision, allow_patterns=wanted, ignore_patterns=not_wanted))
    except (OSError, ValueError) as error:  # among them every error of the Hub's client
        raise InputError(
            f"the base {base!r} is not here and cannot be had from the Hub: {first_line(error)}; name another with --base"
        ) from error


def tensor_names(modules: Iterable[str], weights: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """Tensor name of each module's weight; some checkpoints leave out the first part of a name."""
    names = {}
    for module in modules:
        full = f"{module}.weight"
        short = full.removeprefix(f"{prefix}.")
        if full not in weights and short not in weights:
            raise InputError(
                f"the base's checkpoint has no tensor {full}, which the adapter changes; merge into nf4-dequantized"
            )
        names[module] = full if full in weights else short
    return names


def quantized(name: str, weight: Tensor, *, quant_type: str, double_quant: bool) -> dict[str, Tensor]:
    """The parts under which a checkpoint holds a weight in bitsandbytes' 4-bit format."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), None, None, 64, double_quant, quant_type)
    return {name: packed, **{f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}}


def stored_4bit(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The float32 value of a tensor that transformers saved in bitsandbytes' 4-bit format."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {key.removeprefix(f"{name}."): weights[key].cpu() for key in weights if key.startswith(f"{name}.")}
    return dequantize_4bit(weights[name].cpu(), QuantState.from_dict(parts, device=torch.device("cpu"))).float()
