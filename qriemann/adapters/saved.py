"""A saved LoRA adapter, trained by any tool: what it adds to each weight of its base.

Every command that reads an adapter's folder reads it here. Refused, with the reason in one line, are pickles that were not
named, incomplete files, numbers that are not finite, shapes and ranks that do not match, and missing or additional layers.
"""

from __future__ import annotations

import copy
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qriemann.adapters.saved_config import CONFIG, read_config, value_for
from qriemann.adapters.saved_tensors import PICKLE, first_line, stored_tensors
from qriemann.adapters.targets import shape_of
from qriemann.base.files import load_tokenizer
from qriemann.errors import InputError
from qriemann.upstream import check_target_module_exists

_NAME = re.compile(r"[\w.-]+")
_FACTOR = re.compile(r"base_model\.model\.(?P<module>[\w.-]+)\.lora_(?P<side>[AB])\.(?P<kind>weight|bias)")
_TOKENS = re.compile(r"base_model\.model\.(?P<module>[\w.-]+)\.token_adapter\.trainable_tokens_delta")
# What PEFT puts into the names of tensors of a module that it wraps.
_WRAPPED = re.compile(r"\.(token_adapter|base_layer|modules_to_save)\b")
_OTHER_BASE = "name the base that the adapter was trained on with --base"


@dataclass(frozen=True)
class LoraFactors:
    """The change of one linear layer: scaling B A of its weight, scaling times `bias` of its bias."""

    b: Float[Tensor, "m r"]
    a: Float[Tensor, "r n"]
    scaling: float
    bias: Float[Tensor, " m"] | None = None

    def add_to(self, weight: Float[Tensor, "m n"], *, transposed: bool) -> Float[Tensor, "m n"]:
        """The weight with the change, in float32.

        Args:
            weight: n x m if `transposed`, as a Conv1D has it.
        """
        left, right = (self.a.mT, self.b.mT) if transposed else (self.b, self.a)
        return torch.addmm(weight.float(), left.to(weight.device), right.to(weight.device), alpha=self.scaling)


@dataclass(frozen=True)
class SavedAdapter:
    """The content of an adapter's folder.

    Attributes:
        config: as PEFT reads it.
        layers: the change of each layer, by the module's name in the base.
        replaced: whole tensors that were trained (`modules_to_save`, biases), by their name in the base.
        rows: of the embeddings that were trained alone (`trainable_token_indices`): their numbers and values, by the name of
            the tensor in the base.
    """

    folder: Path
    config: LoraConfig
    layers: dict[str, LoraFactors]
    replaced: dict[str, Tensor]
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)

    def replacement(self, name: str, stored: Tensor) -> Tensor:
        """A tensor of the base with what was trained in its place; `stored` itself where nothing was."""
        tensor = self.replaced.get(name, stored)
        if name in self.rows:
            indices, values = self.rows[name]
            tensor = tensor.index_copy(0, torch.tensor(indices, device=tensor.device), values.to(tensor))
        return tensor

    def grow_vocabulary(self, model: PreTrainedModel) -> str | None:
        """Gives the base the rows for added tokens that the adapter's embeddings have; a line about it, or None."""
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        name, own_head = names[id(embeddings)], names.get(id(head))
        if own_head in self.replaced and head.weight is embeddings.weight and not self.config.modules_to_save:
            # PEFT loads it into the one tensor of the two.
            self.replaced.setdefault(name, self.replaced[own_head])
        before, trained = embeddings.weight.shape, self.replaced.get(name)
        if trained is None or trained.shape[1:] != before[1:] or trained.shape[0] <= before[0]:
            return None
        model.resize_token_embeddings(trained.shape[0], mean_resizing=False)
        return f"the adapter has {trained.shape[0] - before[0]} tokens more than the base, which gets their embeddings"

    def base(self, override: str | None) -> str:
        """The base to load: `override`, or the one that the configuration names.

        Raises:
            InputError: there is neither.
        """
        name = override or self.config.base_model_name_or_path
        if not name:
            raise InputError(f"{self.folder / CONFIG} names no base model; name it with --base")
        return name

    def check_fits(self, model: nn.Module, base: str) -> None:
        """Raises InputError, naming the first mismatch, unless the adapter and the model have the same layers.

        Args:
            model: the base.
            base: its name, for the message.
        """
        for name, layer in self.layers.items():
            expected = (layer.b.shape[0], layer.a.shape[1])
            try:
                found = shape_of(model.get_submodule(name))
            except AttributeError:
                found = None
            if found != expected:
                got = "no such linear layer" if found is None else f"one of {found[0]} x {found[1]}"
                raise InputError(
                    f"the base must have every layer of the adapter, {name} of {expected[0]} x {expected[1]} among them, got "
                    f"{got} in {base}; {_OTHER_BASE}"
                )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, tensor in self.replaced.items():
            shape = tuple(parameters[name].shape) if name in parameters else None
            if shape != tuple(tensor.shape):
                raise InputError(
                    f"the base must have every tensor that was trained whole, {name} of {tuple(tensor.shape)} among them, "
                    f"got {shape or 'no such tensor'} in {base} (the head of a classifier or a reward model is none of a "
                    f"language model); {_OTHER_BASE}"
                )
        for name, (indices, values) in self.rows.items():
            shape = tuple(parameters[name].shape) if name in parameters else (0,)
            if shape[1:] != tuple(values.shape[1:]) or max(indices, default=0) >= shape[0]:
                raise InputError(
                    f"the base must have the embeddings whose rows were trained, {name} with row {max(indices)} of "
                    f"{values.shape[1]} numbers, got {shape} in {base}; {_OTHER_BASE}"
                )
        self._check_named(model, base)

    def put_on(self, model: PreTrainedModel, base: str) -> PeftModel:
        """The model with the adapter, in eval mode, computed by PEFT.

        Args:
            model: the base; its layers are wrapped in place.
            base: its name, for messages.

        Raises:
            InputError: the adapter does not fit.
        """
        self.grow_vocabulary(model)
        self.check_fits(model, base)
        config = copy.copy(self.config)
        # The trained factors replace whatever a start would draw or compute.
        config.init_lora_weights = True
        try:
            return PeftModel.from_pretrained(model, str(self.folder), config=config).eval()
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise InputError(f"{self.folder} does not fit {base}: {' '.join(lines[:2])}; {_OTHER_BASE}") from error

    def _check_named(self, model: Any, base: str) -> None:
        """Raises InputError unless the file holds what the configuration names, and nothing else."""
        config, held = self.config, self.layers.keys()
        named = {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}
        if named != held:
            missing, extra = sorted(named - held), sorted(held - named)
            got = f"none for {missing[0]}" if missing else f"factors for {extra[0]}, which is not one of them"
            raise InputError(
                f"an adapter must have factors for the target_modules of its {CONFIG} in {base}, and for no other layer, got "
                f"{got} in {self.folder}; copy the adapter again, or {_OTHER_BASE}"
            )
        whole = config.modules_to_save or []
        for name in whole:
            if not any(f".{name}." in f".{tensor}" for tensor in self.replaced):
                raise InputError(
                    f"{self.folder} holds no tensor of {name}, one of the adapter's modules_to_save; copy the adapter again"
                )
        # PEFT also saves the embeddings and the head where the vocabulary has grown.
        embeddings = {id(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        may_differ = {f"{name}.weight" for name, module in model.named_modules() if id(module) in embeddings}
        for tensor in self.replaced.keys() - may_differ:
            is_bias = tensor.endswith(".bias") and config.bias != "none"
            if not is_bias and not any(f".{name}." in f".{tensor}" for name in whole):
                raise InputError(
                    f"{self.folder} replaces {tensor} of the base, which the adapter's {CONFIG} does not name; copy the "
                    "adapter again"
                )


def read_adapter(path: str | os.PathLike[str], command: str = "merge") -> SavedAdapter:
    """The plain LoRA adapter in a folder, in float32.

    Args:
        path: the folder, or the `adapter_model.bin` in it: a pickle is read only when it is named, by an unpickler that makes
            tensors and nothing else.
        command: that reads it, one of `saved_config.COMMANDS`.

    Raises:
        InputError: there is no adapter, or it is of a kind that the command does not read; the message says why.
    """
    path, folder = Path(path).expanduser(), adapter_folder(path)
    config = read_config(folder, command)
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    rows: dict[str, tuple[list[int], Tensor]] = {}
    for key, tensor in stored_tensors(folder, pickled=folder != path):
        match, tokens = _FACTOR.fullmatch(key), _TOKENS.fullmatch(key)
        if match is not None and tensor.ndim == (2 if match["kind"] == "weight" else 1):
            side = match["side"] if match["kind"] == "weight" else f"{match['side']} bias"
            factors.setdefault(match["module"], {})[side] = tensor.float()
        elif tokens is not None:
            rows[f"{tokens['module']}.weight"] = _token_rows(tokens["module"], tensor, config, folder)
        elif ".original_module." in key:
            # Of a grown vocabulary PEFT saves what `modules_to_save` replaces as well.
            continue
        elif "lora_" in key or not _NAME.fullmatch(key):
            raise InputError(
                f"an adapter must be plain LoRA on linear layers, got the tensor {key!r} of {tuple(tensor.shape)} in "
                f"{folder}; merge it with the tool that trained it"
            )
        else:
            replaced[_WRAPPED.sub("", key.removeprefix("base_model.model."))] = tensor
    layers = {name: _factors(name, pair, config, folder) for name, pair in sorted(factors.items())}
    if not layers:
        raise InputError(f"{folder} holds no LoRA layer; check the folder")
    return SavedAdapter(folder, config, layers, replaced, rows)


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """The path, or the folder of the pickled weights that it names."""
    path = Path(path).expanduser()
    return path.parent if path.name == PICKLE and path.is_file() else path


def saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the adapter, which has the template and end token of the training; None without one.

    Raises:
        InputError: it cannot be loaded.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        # Without the argument transformers asks at the terminal whether to run code that tokenizer_config.json names.
        return load_tokenizer(str(folder), trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # Broken files make transformers raise exceptions of any type.
        raise InputError(
            f"transformers cannot load the tokenizer in {folder}: {first_line(error)}; remove tokenizer_config.json to use "
            "the base's"
        ) from error


def _token_rows(module: str, values: Tensor, config: LoraConfig, folder: Path) -> tuple[list[int], Tensor]:
    """The numbers of the tokens whose embeddings were trained alone, and these embeddings."""
    named = config.trainable_token_indices or []
    if isinstance(named, dict):
        named = next((numbers for name, numbers in named.items() if f".{module}".endswith(f".{name}")), [])
    if values.ndim != 2 or len(named) != values.shape[0]:
        raise InputError(
            f"an adapter must hold a row for each of the {len(named)} trainable_token_indices of its {CONFIG}, got "
            f"{tuple(values.shape)} for {module} in {folder}; copy or train it again"
        )
    return list(named), values


def _factors(name: str, pair: dict[str, Tensor], config: LoraConfig, folder: Path) -> LoraFactors:
    rank = value_for(config.rank_pattern, name, config.r)
    bias = pair.pop("B bias", None) if config.lora_bias else None
    if pair.keys() != {"A", "B"} or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
        shapes = {f"lora_{side}": tuple(tensor.shape) for side, tensor in sorted(pair.items())}
        raise InputError(
            f"every layer must have factors B (m x r) and A (r x n) of the rank r = {rank} that {CONFIG} says, got {shapes} "
            f"for {name!r} in {folder}; copy or train it again"
        )
    alpha = value_for(config.alpha_pattern, name, config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if not math.isfinite(scaling):
        raise InputError(
            f"lora_alpha must be finite, got {alpha!r} for {name!r} in {folder / CONFIG}; correct the file"
        )
    return LoraFactors(pair["B"], pair["A"], scaling, bias)
