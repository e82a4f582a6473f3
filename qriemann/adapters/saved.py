"""A LoRA adapter as PEFT saves it, whoever trained it: what it adds to each weight of its base.

Everything that reads an adapter's folder comes through here, because the folder may be anybody's. What is refused has one
line that says why: pickles that were not asked for by name, files that are cut short or lie about their sizes, numbers that
are not finite, shapes that do not belong together, layers that are missing or too many, and configurations that ask for code.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qriemann.adapters.finite import is_finite
from qriemann.adapters.saved_config import CONFIG, read_config, value_for
from qriemann.base.files import load_tokenizer
from qriemann.errors import InputError

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_NAME = re.compile(r"[\w.-]+")
_FACTOR = re.compile(r"base_model\.model\.(?P<module>[\w.-]+)\.lora_(?P<side>[AB])\.weight")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class LoraFactors:
    """The change of one linear layer's weight: scaling B A."""

    b: Float[Tensor, "m r"]
    a: Float[Tensor, "r n"]
    scaling: float


@dataclass(frozen=True)
class SavedAdapter:
    """The content of an adapter's folder.

    Attributes:
        config: as PEFT reads it.
        layers: the change of each layer, by the module's name in the base.
        replaced: whole tensors that were trained (`modules_to_save`, biases), by their name in the base.
    """

    folder: Path
    config: LoraConfig
    layers: dict[str, LoraFactors]
    replaced: dict[str, Tensor]

    def base(self, override: str | None) -> str:
        """The base to load: `override`, or the one that the configuration names.

        Raises:
            InputError: if neither does.
        """
        name = override or self.config.base_model_name_or_path
        if not name:
            raise InputError(
                f"an adapter must name its base model, got none in {self.folder / CONFIG}; name it with --base"
            )
        return name

    def check_fits(self, model: nn.Module, base: str) -> None:
        """Raises InputError, naming the first mismatch, unless adapter and model have the same layers."""
        remedy = "name the base that the adapter was trained on with --base"
        for name, layer in self.layers.items():
            expected = (layer.b.shape[0], layer.a.shape[1])
            try:
                module: Any = model.get_submodule(name)
                found = (module.out_features, module.in_features)
            except AttributeError:
                found = None
            if found != expected:
                rows, columns = expected
                what = "no such linear layer" if found is None else f"one of {found[0]} x {found[1]}"
                raise InputError(
                    f"the base must have every layer of the adapter, {name} of {rows} x {columns} among them, got {what} in "
                    f"{base}; {remedy}"
                )
        parameters = dict(model.named_parameters())
        for name, tensor in self.replaced.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                shape = tuple(parameters[name].shape) if name in parameters else "no such tensor"
                raise InputError(
                    f"the base must have every tensor that was trained whole, {name} of {tuple(tensor.shape)} among them, "
                    f"got {shape} in {base} (a head that is tied to the embeddings has none); {remedy}"
                )
        self._check_targets(model, base)

    def put_on(self, model: PreTrainedModel, base: str) -> PeftModel:
        """The model with the adapter, in eval mode, computed by PEFT.

        Args:
            model: the base; its layers are wrapped in place.
            base: the name it has in messages.

        Raises:
            InputError: the adapter does not fit.
        """
        self.check_fits(model, base)
        config = copy.copy(self.config)
        # By their names: a stranger's pattern may take hours on a name that it does not match.
        config.target_modules = set(self.layers)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.rank_pattern = _by_value({name: layer.b.shape[1] for name, layer in self.layers.items()})
        config.alpha_pattern = _by_value(
            {name: value_for(self.config.alpha_pattern, name, config.lora_alpha) for name in self.layers}
        )
        # What is drawn or computed for a start is overwritten by what was trained.
        config.init_lora_weights = True
        try:
            return PeftModel.from_pretrained(model, str(self.folder), config=config).eval()
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise InputError(
                f"the adapter must fit its base, got {self.folder} on {base}: {' '.join(lines[:2])}; name the right base "
                "with --base"
            ) from error

    def _check_targets(self, model: nn.Module, base: str) -> None:
        """What the configuration names is what the file holds; where it names layers by a pattern, the file decides."""
        config = self.config
        by_name = not isinstance(config.target_modules, str) and not isinstance(config.exclude_modules, str)
        if by_name and config.target_modules and config.layers_to_transform is None:
            named = {name for name, _ in model.named_modules() if check_target_module_exists(config, name) is True}
            missing, extra = sorted(named - self.layers.keys()), sorted(self.layers.keys() - named)
            if missing or extra:
                got = f"none for {missing[0]}" if missing else f"factors for {extra[0]}, which is not one of them"
                raise InputError(
                    f"an adapter must have factors for the target_modules of its {CONFIG} in {base}, and for no other layer, "
                    f"got {got} in {self.folder}; copy the adapter again, or name the right base with --base"
                )
        whole = config.modules_to_save or []
        absent = [name for name in whole if not any(f".{name}." in f".{tensor}" for tensor in self.replaced)]
        if absent:
            raise InputError(
                f"an adapter must hold every one of its modules_to_save, got no tensor of {absent[0]} in {self.folder}; "
                "copy the adapter again"
            )
        # PEFT saves the embeddings and the head with an adapter when the vocabulary has grown.
        embeddings = {id(layer) for layer in _embeddings(model)}
        may_differ = {f"{name}.weight" for name, module in model.named_modules() if id(module) in embeddings}
        for tensor in self.replaced.keys() - may_differ:
            is_bias = tensor.endswith(".bias") and config.bias != "none"
            if not is_bias and not any(f".{name}." in f".{tensor}" for name in whole):
                raise InputError(
                    f"an adapter must not replace weights of its base that its {CONFIG} does not name, got {tensor} in "
                    f"{self.folder}; copy the adapter again"
                )


def read_adapter(path: str | os.PathLike[str]) -> SavedAdapter:
    """The plain LoRA adapter in a folder, in float32.

    Args:
        path: the folder, or the `adapter_model.bin` in it: a pickle is read for who names it, by an unpickler that makes
            tensors and nothing else.

    Raises:
        InputError: no adapter there, or one that is not plain LoRA on linear layers; the reason is named.
    """
    path, folder = Path(path).expanduser(), adapter_folder(path)
    config = read_config(folder)
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in _stored_tensors(folder, pickled=folder != path):
        match = _FACTOR.fullmatch(key)
        if match is not None and tensor.ndim == 2:
            factors.setdefault(match["module"], {})[match["side"]] = tensor.float()
        elif "lora_" in key or not _NAME.fullmatch(key):
            raise InputError(
                f"an adapter must be plain LoRA on linear layers, got the tensor {key!r} of {tuple(tensor.shape)} in "
                f"{folder}; merge it with the tool that trained it"
            )
        else:
            replaced[key.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    layers = {name: _factors(name, pair, config, folder) for name, pair in sorted(factors.items())}
    if not layers:
        raise InputError(f"an adapter must have a LoRA layer, got none in {folder}; check the folder")
    return SavedAdapter(folder, config, layers, replaced)


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """The path, or the folder of the pickled weights that it names."""
    path = Path(path).expanduser()
    return path.parent if path.name == PICKLE and path.is_file() else path


def finite_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, one at a time.

    Raises:
        InputError: the file is not whole, or holds something else than finite floating-point numbers.
    """
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                dtype, shape = file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()
                # No bytes bound the other sizes of an empty tensor: they overflow whatever looks at them.
                looked_into = dtype in _DTYPES and 0 not in shape
                yield key, _checked(path, key, f"{dtype} {shape}", file.get_tensor(key) if looked_into else None)
    except InputError:
        raise
    except Exception as error:  # safetensors, and torch under it, each have their own
        raise InputError(
            f"{path} must be a whole safetensors file, got: {_first_line(error)}; copy or train it again"
        ) from error


def saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with the adapter, whose template and end token it was trained with; None without one.

    Raises:
        InputError: it cannot be loaded, or asks for code to be run.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        # Left out, transformers would ask at the terminal whether to run the code that a tokenizer_config.json names.
        return load_tokenizer(str(folder), trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # whatever is wrong with the files
        raise InputError(
            f"the tokenizer beside an adapter must be one that transformers loads, got {folder}: {_first_line(error)}; "
            "remove tokenizer_config.json to take the base's"
        ) from error


def _stored_tensors(folder: Path, *, pickled: bool) -> Iterator[tuple[str, Tensor]]:
    if (folder / WEIGHTS).is_file():
        if pickled:
            raise InputError(f"a pickle must not be read beside {WEIGHTS}, got both in {folder}; name the folder")
        return finite_tensors(folder / WEIGHTS)
    if not (folder / PICKLE).is_file():
        raise InputError(f"an adapter must hold {WEIGHTS}, got none in {folder}; train or copy it again")
    if not pickled:
        raise InputError(
            f"an adapter's weights must be safetensors, got a pickle in {folder}; if you trust who made it, name the file "
            f"itself: {folder / PICKLE}"
        )
    return _unpickled(folder / PICKLE)


def _unpickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # The unpickler lets through whatever a broken file makes it stumble over.
        raise InputError(
            f"{path} must be a pickle of tensors alone, got {type(error).__name__}; copy or train it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must map names to tensors, got a {type(content).__name__}; copy or train it again")
    for key, tensor in content.items():
        # A view may claim more numbers than the file has.
        plain = (
            isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.is_contiguous() and tensor.numel()
        )
        if not isinstance(key, str) or not plain:
            raise InputError(f"{path} must map names to plain tensors, got {key!r:.80}; copy or train it again")
        yield key, _checked(path, key, str(tensor.dtype), tensor if tensor.dtype in _DTYPES.values() else None)


def _checked(path: Path, key: str, kind: str, tensor: Tensor | None) -> Tensor:
    """The tensor, if its numbers are finite; None stands for one that is not looked into."""
    if tensor is None or not is_finite(tensor):
        got = f"{key!r:.80} as {kind:.80}" if tensor is None else f"numbers that are not finite in {key!r}"
        raise InputError(f"{path} must hold finite numbers of {', '.join(_DTYPES)}, got {got}; copy or train it again")
    return tensor


def _factors(name: str, pair: dict[str, Tensor], config: LoraConfig, folder: Path) -> LoraFactors:
    shapes = {f"lora_{side}": tuple(tensor.shape) for side, tensor in sorted(pair.items())}
    rank = value_for(config.rank_pattern, name, config.r)
    if pair.keys() != {"A", "B"} or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
        raise InputError(
            f"every layer must have factors B (m x r) and A (r x n) of the rank r = {rank} that {CONFIG} says, got {shapes} "
            f"for {name!r} in {folder}; copy or train it again"
        )
    alpha = value_for(config.alpha_pattern, name, config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    size = abs(scaling) * math.prod(float(factor.double().norm()) for factor in pair.values())
    if not size < torch.finfo(torch.float32).max:
        raise InputError(
            f"every layer must change by finite numbers, got a norm of {size:.1e} for {name!r} in {folder}; train it again"
        )
    return LoraFactors(pair["B"], pair["A"], scaling)


def _by_value(values: dict[str, Any]) -> dict[str, Any]:
    """One pattern for all layers of a value: PEFT 0.21 takes minutes for a thousand patterns, which re does not cache."""
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(re.escape(name))
    return {"|".join(group): value for value, group in names.items()}


def _embeddings(model: Any) -> list[nn.Module]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()] if isinstance(model, PreTrainedModel) else []
    return [layer for layer in layers if layer is not None]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")
