"""A LoRA adapter as PEFT saves it, whoever trained it: what it adds to each weight of its base."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from qriemann.errors import InputError

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# What makes the trained function something else than W + scaling B A on linear layers.
_NOT_PLAIN = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# These starts change the base's own weights, which the folder does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
                f"an adapter must name its base model, got none in {self.folder}/adapter_config.json; name it with --base"
            )
        return name

    def check_fits(self, model: nn.Module, base: str) -> None:
        """Raises InputError, naming the first mismatch, unless every layer has its place in the model."""
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


def read_adapter(folder: str | Path) -> SavedAdapter:
    """The plain LoRA adapter in the folder, in float32.

    Raises:
        InputError: no adapter there, or one that is not plain LoRA on linear layers; the reason is named.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors, pickle and the Hub client each have their own
        raise InputError(
            f"{folder} must hold the adapter's weights, got {type(error).__name__}: {str(error).splitlines()[0]}; train or "
            "copy it again"
        ) from error
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is not None and tensor.ndim == 2:
            factors.setdefault(match["module"], {})[match["side"]] = tensor.float()
        elif "lora_" in key:
            raise InputError(
                f"an adapter must be plain LoRA on linear layers, got the tensor {key} of {tuple(tensor.shape)} in {folder}; "
                "merge it with the tool that trained it"
            )
        else:
            replaced[key.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    layers = {name: _factors(name, pair, config, folder) for name, pair in sorted(factors.items())}
    if not layers:
        raise InputError(f"an adapter must have a LoRA layer, got none in {folder}; check the folder")
    return SavedAdapter(folder, config, layers, replaced)


def _read_config(folder: Path) -> LoraConfig:
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"an adapter must be a folder with an adapter_config.json, got {folder}; check the path")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"adapter_config.json must be one that PEFT reads, got {folder}: {error}; check the file"
        ) from error
    if not isinstance(config, LoraConfig):
        raise InputError(f"an adapter must be LoRA, got {config.peft_type} in {folder}; merge it with PEFT")
    flags = [name for name in _NOT_PLAIN if getattr(config, name, None)]
    start = str(config.init_lora_weights)
    if flags or start.startswith(_CHANGES_BASE):
        got = flags[0] if flags else f"init_lora_weights={start!r}, which changes the base's own weights"
        raise InputError(
            f"an adapter must be plain LoRA on linear layers, got {got} in {folder}; merge it with the tool that trained it"
        )
    return config


def _factors(name: str, pair: dict[str, Tensor], config: LoraConfig, folder: Path) -> LoraFactors:
    if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
        shapes = {f"lora_{side}": tuple(tensor.shape) for side, tensor in pair.items()}
        raise InputError(f"every layer must have factors B (m x r) and A (r x n), got {shapes} for {name} in {folder}")
    if not (pair["A"].isfinite().all() and pair["B"].isfinite().all()):
        raise InputError(f"every layer must hold finite numbers, got others in {name} of {folder}; train it again")
    patterns_alpha, patterns_rank = config.alpha_pattern or {}, config.rank_pattern or {}
    alpha = patterns_alpha.get(get_pattern_key(patterns_alpha.keys(), name), config.lora_alpha)
    rank = patterns_rank.get(get_pattern_key(patterns_rank.keys(), name), config.r)
    return LoraFactors(pair["B"], pair["A"], alpha / (math.sqrt(rank) if config.use_rslora else rank))
