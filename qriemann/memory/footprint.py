"""What a run keeps in memory, and what its steps take beyond that, from the model's configuration alone.

What is stored is added up tensor by tensor; what is computed is counted by memory.py on models without content. Two things
are assumptions, because no GPU was there to measure them: what the driver and the libraries take beside torch's tensors, and
how many blocks a step of the optimizer works in.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import IntervalStrategy

from qriemann.adapters.layer import FixedRankVariant
from qriemann.adapters.targets import adapter_config, check_targets
from qriemann.base.host_embedding import has_tied_embeddings, refuse_tied_embeddings
from qriemann.base.load import read_config
from qriemann.config.settings import RunConfig
from qriemann.errors import InputError
from qriemann.geometry.parameter import FixedRankParameter
from qriemann.geometry.point import FixedRankPoint
from qriemann.memory.live_bytes import QuantizedLinear, adapter_tensors, count_step, nf4_bytes, shapes_of
from qriemann.optim.methods import find_method

GIB = 2**30

# Assumed: the CUDA context with the loaded kernels and cuBLAS' workspace, as current drivers report it for small programs.
CONTEXT = int(0.5 * GIB)
# Python with torch, transformers, TRL and bitsandbytes loaded, resident on Linux before any model.
_PROCESS = int(0.55 * GIB)

# Blocks of a factor's size that each optimizer keeps, and the ones that come and go in a step.
_STATE_BLOCKS = {"scaled-adamw": 2, "adamw": 2}
_ONE_BLOCK, _STEP_BLOCKS = 1, 2


@dataclass(frozen=True)
class Load:
    """What of a run decides about its memory, beside the model."""

    batch: int
    eval_batch: int
    length: int
    checkpointing: bool


class Footprint:
    """The memory of one configuration's run; models and counts are kept for the next question."""

    def __init__(self, config: RunConfig) -> None:
        sft, model = config.sft, config.model
        self.config = config
        self.on_gpu = not sft.use_cpu
        if sft.max_length is None:
            raise InputError("max_length must be a number of tokens to plan with, got none; add --max_length 2048")
        if not model.model_name_or_path:
            raise InputError(
                "model_name_or_path must name a model to plan for, got none; add the key model_name_or_path"
            )
        self.name = model.model_name_or_path
        self.shape = _text_config(self.name, model.model_revision, sft.trust_remote_code)
        dtype = getattr(torch, model.dtype or ("bfloat16" if self.on_gpu else "float32"), None)
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"dtype must be bfloat16, float16 or float32 to plan with, got {model.dtype!r}; name one")
        self.dtype = dtype
        self.attention = model.attn_implementation or "sdpa"
        # Without a GPU here, the defaults in the configuration are those of a run on the CPU.
        checkpointing = sft.activation_checkpointing if "activation_checkpointing" in config.explicit else self.on_gpu
        self.load = Load(
            sft.per_device_train_batch_size, sft.per_device_eval_batch_size, sft.max_length, bool(checkpointing)
        )
        self.offloads_embeddings = config.qriemann.offload_embeddings
        self.on_manifold = find_method(config.qriemann.method).on_manifold
        self._models: dict[int | None, PeftModel] = {}
        self._peaks: dict[Load, tuple[str, Counter[str]]] = {}

    def model(self, layers: int | None = None) -> PeftModel:
        """The model with its adapter, without content; its first layers alone where `layers` says how many."""
        if layers not in self._models:
            self._models[layers] = self._make_model(layers)
        return self._models[layers]

    def _make_model(self, layers: int | None) -> PeftModel:
        shape = self.shape if layers is None else _shallow(self.shape, layers)
        quantized = self.config.quantize is not None
        base = shapes_of(shape, self.dtype, quantized=quantized, eager=self.attention == "eager")
        if self.offloads_embeddings:
            refuse_tied_embeddings(base, self.name)
        adapter = adapter_config(self.config.model)
        check_targets(base, adapter)
        with warnings.catch_warnings():
            # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
            warnings.filterwarnings(
                "ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning
            )
            model = get_peft_model(base, adapter, low_cpu_mem_usage=True)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # TRL casts what is trained beside a 4-bit base to bf16; the factors become float32 later.
                kept = torch.bfloat16 if quantized else parameter.dtype
                parameter.data = parameter.data.to(torch.float32 if "lora_" in name else kept)
        if self.on_manifold:
            _put_on_manifold(model, offset=self.config.qriemann.start == "offset")
        return model

    def stored(self) -> list[tuple[str, int]]:
        """(what, bytes) of all that stays: weights, adapter, optimizer state, and what is not torch's."""
        model = self.model()
        quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        four_bit = {id(module.weight) for module in quantized}
        factors: list[Tensor] = []
        others: list[Tensor] = []
        frozen: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if id(parameter) not in four_bit:
                (frozen if not parameter.requires_grad else factors if "lora_" in name else others).append(parameter)
        if self.offloads_embeddings and self.on_gpu:
            frozen = [tensor for tensor in frozen if tensor is not model.get_input_embeddings().weight]
        factor_bytes, other_bytes = _bytes(factors), _bytes(others)
        ours = self.config.qriemann
        blocks = _STATE_BLOCKS.get(ours.method, _ONE_BLOCK)
        if ours.method == "scaled-gd" and not ours.momentum:
            blocks = 0
        state = blocks * factor_bytes + 2 * other_bytes
        if not self.on_gpu and self.on_manifold:
            # On the CPU the optimizer keeps the room it works in.
            state += _STEP_BLOCKS * factor_bytes
        rows = [
            ("4-bit weights and scales", sum(nf4_bytes(module.weight.numel()) for module in quantized)),
            (f"not quantized: embeddings, head, norms ({_word(self.dtype)})", _bytes([*frozen, *model.buffers()])),
            ("adapter (float32)", factor_bytes + other_bytes),
            ("cores and frozen offset (float32)", _bytes(adapter_tensors(model))),
            ("optimizer state", state),
            ("CUDA context and libraries (assumed)", CONTEXT) if self.on_gpu else ("Python and libraries", _PROCESS),
        ]
        return [(name, size) for name, size in rows if size]

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the input embeddings that host memory can hold, or holds, in place of the card; 0 if it cannot."""
        model = self.model()
        matrix = model.get_input_embeddings().weight
        return 0 if has_tied_embeddings(model) or matrix.requires_grad or not self.on_gpu else _bytes([matrix])

    def computed(self, load: Load) -> tuple[str, Counter[str]]:
        """The phase of a step in which most bytes live beyond what is stored, and those bytes by part."""
        if load not in self._peaks:
            self._peaks[load] = self._computed(load)
        return self._peaks[load]

    def _computed(self, load: Load) -> tuple[str, Counter[str]]:
        phases = {"training": self._peak(load, load.batch, training=True)}
        if self.config.sft.eval_strategy != IntervalStrategy.NO:
            phases["evaluation"] = self._peak(load, load.eval_batch, training=False)
        trainable = _bytes([parameter for parameter in self.model().parameters() if parameter.requires_grad])
        workspace = _STEP_BLOCKS * trainable if self.on_gpu else 0
        phases["optimizer step"] = Counter({"gradients": trainable, "workspace of the step": workspace})
        return max(phases.items(), key=lambda item: item[1].total())

    def _peak(self, load: Load, batch: int, *, training: bool) -> Counter[str]:
        """The peak of one batch, from models of two and three layers where all layers are alike."""
        counts = [self._count(depth, load, batch, training) for depth in self._depths]
        if len(counts) == 1:
            return max(counts[0].values(), key=Counter.total)
        two, three = counts
        more = self.shape.num_hidden_layers - 2
        grown = [
            Counter({part: two[window][part] + more * (peak[part] - two[window][part]) for part in peak})
            for window, peak in three.items()
        ]
        return max(grown, key=Counter.total)

    @property
    def _depths(self) -> tuple[int | None, ...]:
        layers = [module for module in self.model().modules() if isinstance(module, GradientCheckpointingLayer)]
        kinds = {tuple(parameter.shape for parameter in layer.parameters()) for layer in layers}
        return (2, 3) if len(kinds) == 1 and len(layers) > 3 else (None,)

    def _count(self, depth: int | None, load: Load, batch: int, training: bool) -> dict[str, Counter[str]]:
        model = self.model(depth)
        _set_checkpointing(model, load.checkpointing)
        batch, length, padded = self._input(batch, load.length)
        return count_step(
            model,
            batch=batch,
            length=length,
            padded=padded,
            training=training,
            on_gpu=self.on_gpu,
            grads_held=training and self.config.sft.gradient_accumulation_steps > 1,
        )

    def _input(self, batch: int, length: int) -> tuple[int, int, bool]:
        """Rows, tokens a row, and whether the attention needs a mask for them."""
        sft = self.config.sft
        takes_mask = self.attention in ("sdpa", "eager")
        if sft.packing and sft.packing_strategy != "wrapped":
            # The collator lays all samples of a batch into one row.
            return 1, batch * length, takes_mask
        return batch, length, takes_mask and (self.attention == "eager" or (batch > 1 and not sft.packing))


def _text_config(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    config = read_config(os.fspath(name), revision=revision, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with its first layers alone."""
    shallow = copy.deepcopy(config)
    for key, value in vars(shallow).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(shallow, key, value[:layers])
    shallow.num_hidden_layers = layers
    return shallow


def _put_on_manifold(model: nn.Module, *, offset: bool) -> None:
    """What `attach` makes of the adapter, without content."""
    for name, module in model.named_modules():
        if not hasattr(module, "lora_variant"):
            continue
        u, v_transposed = module.lora_B["default"].weight, module.lora_A["default"].weight
        s = u.new_empty(u.shape[1], u.shape[1])
        frozen = None
        if offset:
            frozen = FixedRankPoint(
                torch.empty_like(u.data), torch.empty_like(s), torch.empty_like(v_transposed.data.mT)
            )
        module.lora_variant["default"] = FixedRankVariant(FixedRankParameter(name, u, v_transposed, s, frozen))
        module.cast_input_dtype_enabled = False


def _set_checkpointing(model: PeftModel, wanted: bool) -> None:
    base = model.get_base_model()
    if wanted and not base.is_activation_checkpointing:
        base.activation_checkpointing_enable()
        base.enable_input_require_grads()
    elif not wanted and base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
