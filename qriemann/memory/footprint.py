"""What a run stores, and what its steps allocate beyond that, from the model's configuration alone.

Assumed, because no GPU was there to measure it: what the driver and the libraries take, and an optimizer step's workspace.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from qriemann.adapters.layer import FixedRankVariant
from qriemann.adapters.targets import adapter_config, check_targets, without_experts
from qriemann.base.host_embedding import has_tied_embeddings, refuse_tied_embeddings
from qriemann.base.load import read_config
from qriemann.errors import InputError
from qriemann.geometry.parameter import FixedRankParameter
from qriemann.geometry.point import FixedRankPoint
from qriemann.memory.live_bytes import CONTEXT, GIB, adapter_tensors, total_bytes
from qriemann.memory.meta_step import QuantizedLinear, count_step, meta_model, nf4_bytes
from qriemann.optim.methods import find_method
from qriemann.upstream import quiet

if TYPE_CHECKING:
    from qriemann.config import Settings
from qriemann.config.arguments import run_dtype, training_arguments

# Python with torch, transformers, TRL and bitsandbytes loaded, resident on Linux before any model.
_PROCESS = int(0.55 * GIB)

# Blocks of a factor's size that an optimizer's step allocates.
_STEP_BLOCKS = 2


@dataclass(frozen=True)
class Workload:
    """What decides, beside model and adapter, how much memory a run takes; named as in the settings.

    Attributes:
        start: of an adapter on the manifold; None for plain factors.
        per_device_eval_batch_size: 0 without evaluation.
    """

    on_gpu: bool
    dtype: torch.dtype
    quantize: str
    attn_implementation: str
    state_blocks: int
    start: str | None
    offload_embeddings: bool
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    packing_strategy: str | None
    activation_checkpointing: bool
    activation_offloading: bool
    dense_copies: bool

    @property
    def quantized(self) -> bool:
        return self.quantize != "none"

    @property
    def holds_dense_copies(self) -> bool:
        return self.dense_copies and self.quantized and not self.on_gpu


def read_run(settings: Settings, *, dense_copies: bool = True) -> tuple[Footprint, Workload]:
    """The model of a run and its workload; the only place in `memory/` that reads settings."""
    args = training_arguments(settings)
    if args.max_length is None:
        raise InputError("plan needs the number of tokens a row: add max_length, for example --max_length 2048")
    on_gpu = not settings.use_cpu
    dtype = run_dtype(settings, torch.device("cuda" if on_gpu else "cpu"))
    method = find_method(settings.method)
    # On a machine without a GPU the default is that of a CPU run.
    checkpointing = args.activation_checkpointing if "activation_checkpointing" in settings.written else on_gpu
    workload = Workload(
        on_gpu=on_gpu,
        dtype=dtype,
        quantize=settings.quantize,
        attn_implementation=settings.attn_implementation or "sdpa",
        state_blocks=method.kept_blocks(settings.momentum),
        start=settings.start if method.on_manifold else None,
        offload_embeddings=settings.offload_embeddings,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_eval_batch_size if args.eval_strategy != "no" else 0,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_length=args.max_length,
        packing_strategy=args.packing_strategy if args.packing else None,
        activation_checkpointing=bool(checkpointing),
        activation_offloading=args.activation_offloading,
        dense_copies=dense_copies,
    )
    name = settings.named("model_name_or_path")
    shape = read_config(name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code)
    footprint = Footprint(name, shape, adapter_config(settings, offset=workload.start == "offset"))
    if workload.offload_embeddings:
        refuse_tied_embeddings(footprint.model(workload).get_base_model(), name)
    return footprint, workload


class Footprint:
    """The bytes of one model with one adapter under any workload; models and counts are kept for the next question."""

    def __init__(self, name: str, shape: PreTrainedConfig, adapter: LoraConfig) -> None:
        if hasattr(shape, "quantization_config"):
            del shape.quantization_config
        self.name, self.shape, self.adapter = name, shape, adapter
        self.left_out: str | None = None
        self._models: dict[tuple[int | None, bool], PeftModel] = {}
        self._peaks: dict[tuple[Workload, bool], Counter[str]] = {}

    def model(self, workload: Workload, layers: int | None = None) -> PeftModel:
        """The model with its adapter on the meta device; only its first layers if `layers` is given."""
        key = layers, workload.quantized
        if key not in self._models:
            self._models[key] = self._make_model(workload, layers)
        return self._models[key]

    def _make_model(self, workload: Workload, layers: int | None) -> PeftModel:
        shape = self.shape if layers is None else _shallow(self.shape, layers)
        quantized, eager = workload.quantized, workload.attn_implementation == "eager"
        base = meta_model(shape, workload.dtype, quantized=quantized, eager=eager)
        adapter, self.left_out = without_experts(base, copy.deepcopy(self.adapter))
        check_targets(base, adapter)
        with quiet():
            model = get_peft_model(base, adapter, low_cpu_mem_usage=True)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # TRL casts what is trained beside a 4-bit base to bf16; the optimizer makes the factors float32 again.
                kept = torch.bfloat16 if quantized else parameter.dtype
                parameter.data = parameter.data.to(torch.float32 if "lora_" in name else kept)
        if workload.start is not None:
            _put_on_manifold(model, offset=workload.start == "offset")
        return model

    def stored(self, workload: Workload) -> list[tuple[str, int]]:
        """(what, bytes) of everything that stays for the whole run; the last row is not torch's."""
        model = self.model(workload)
        weights = [module.weight for module in model.modules() if isinstance(module, QuantizedLinear)]
        four_bit = {id(weight) for weight in weights}
        factors: list[Tensor] = []
        others: list[Tensor] = []
        frozen: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if id(parameter) not in four_bit:
                (frozen if not parameter.requires_grad else factors if "lora_" in name else others).append(parameter)
        if workload.offload_embeddings and workload.on_gpu:
            frozen = [tensor for tensor in frozen if tensor is not model.get_input_embeddings().weight]
        factor_bytes, other_bytes = total_bytes(factors), total_bytes(others)
        # On the CPU an optimizer on the manifold keeps its workspace between steps.
        kept = _STEP_BLOCKS if workload.start is not None and not workload.on_gpu else 0
        dtype = str(workload.dtype).removeprefix("torch.")
        rows = [
            ("4-bit weights and scales", sum(nf4_bytes(weight.numel()) for weight in weights)),
            ("4-bit weights, dequantized for the CPU", total_bytes(weights) if workload.holds_dense_copies else 0),
            (
                f"not quantized: embeddings, head, norms{', experts' if self.left_out else ''} ({dtype})",
                total_bytes([*frozen, *model.buffers()]),
            ),
            ("adapter (float32)", factor_bytes + other_bytes),
            ("cores and frozen offset (float32)", total_bytes(adapter_tensors(model))),
            ("optimizer state", (workload.state_blocks + kept) * factor_bytes + 2 * other_bytes),
            ("CUDA context and libraries (assumed)", CONTEXT)
            if workload.on_gpu
            else ("Python and libraries", _PROCESS),
        ]
        return [(name, size) for name, size in rows if size]

    def embedding_bytes(self, workload: Workload) -> int:
        """Bytes of the input embeddings that host memory can hold in place of the card; 0 if it cannot."""
        model = self.model(workload)
        matrix = model.get_input_embeddings().weight
        movable = workload.on_gpu and not (has_tied_embeddings(model) or matrix.requires_grad)
        return total_bytes([matrix]) if movable else 0

    def merge_bytes(self, workload: Workload) -> tuple[int, int]:
        """Bytes in float32 of what `merge` loads: the base that training saw, in 4 bit, and the model that it has written."""
        recorded = merged = 0
        four_bit = {id(m.weight) for m in self.model(workload).modules() if isinstance(m, QuantizedLinear)}
        for name, parameter in self.model(workload).named_parameters():
            if "lora_" not in name:
                merged += 4 * parameter.numel()
                recorded += nf4_bytes(parameter.numel()) if id(parameter) in four_bit else 4 * parameter.numel()
        return recorded, merged

    def computed(self, workload: Workload) -> tuple[str, Counter[str]]:
        """The phase of a step that allocates most beyond what is stored, and its bytes by part."""
        phases = {"training": self._peak(replace(workload, per_device_eval_batch_size=0), training=True)}
        if rows := workload.per_device_eval_batch_size:
            evaluation = replace(workload, per_device_train_batch_size=rows, per_device_eval_batch_size=0)
            phases["evaluation"] = self._peak(evaluation, training=False)
        trainable = total_bytes([p for p in self.model(workload).parameters() if p.requires_grad])
        workspace = _STEP_BLOCKS * trainable if workload.on_gpu else 0
        phases["optimizer step"] = Counter({"gradients": trainable, "workspace of the step": workspace})
        return max(phases.items(), key=lambda item: item[1].total())

    def _peak(self, workload: Workload, *, training: bool) -> Counter[str]:
        """The peak of one batch, extrapolated from models of two and three layers if all layers are alike."""
        if (workload, training) not in self._peaks:
            depths: tuple[int | None, ...] = (2, 3) if self.has_like_layers(workload) else (None,)
            first, *deeper = (self._count(self.model(workload, depth), workload, training) for depth in depths)
            more = self.shape.num_hidden_layers - 2
            grown = [
                Counter({part: first[window][part] + more * (peak[part] - first[window][part]) for part in peak})
                for counted in deeper
                for window, peak in counted.items()
            ]
            self._peaks[workload, training] = max(grown or first.values(), key=Counter.total)
        return self._peaks[workload, training]

    def has_like_layers(self, workload: Workload) -> bool:
        """Whether the model has more than three layers, all of one shape."""
        layers = [module for module in self.model(workload).modules() if isinstance(module, GradientCheckpointingLayer)]
        return len(layers) > 3 and len({tuple(p.shape for p in layer.parameters()) for layer in layers}) == 1

    def _count(self, model: PeftModel, workload: Workload, training: bool) -> dict[str, Counter[str]]:
        _set_checkpointing(model, workload.activation_checkpointing)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.dequantized = workload.holds_dense_copies
        batch, length, attention = (
            workload.per_device_train_batch_size,
            workload.max_length,
            workload.attn_implementation,
        )
        if workload.packing_strategy not in (None, "wrapped"):
            # The collator lays all samples of a batch into one row, which needs a mask to keep them apart.
            batch, length, masked = 1, batch * length, attention in ("sdpa", "eager")
        else:
            masked = attention == "eager" or (attention == "sdpa" and batch > 1 and workload.packing_strategy is None)
        return count_step(
            model,
            batch=batch,
            length=length,
            masked=masked,
            training=training,
            on_gpu=workload.on_gpu,
            grads_held=training and workload.gradient_accumulation_steps > 1,
        )


def _shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with its first layers alone."""
    shallow = copy.deepcopy(config)
    for key, value in vars(shallow).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(shallow, key, value[:layers])
    shallow.num_hidden_layers = layers
    return shallow


def _put_on_manifold(model: nn.Module, *, offset: bool) -> None:
    """Puts the adapter on the manifold as `attach` does, without content."""
    for name, module in model.named_modules():
        if not hasattr(module, "lora_variant"):
            continue
        u, v_transposed = module.lora_B["default"].weight, module.lora_A["default"].weight
        s = u.new_empty(u.shape[1], u.shape[1])
        frozen = FixedRankPoint(*(torch.empty_like(t.data) for t in (u, s, v_transposed.mT))) if offset else None
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
