"""Random models of a few thousand weights, and the dense float64 truth of what an adapter does to one.

Shared by the tests of adapters, optimizers and the trainer seam.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qriemann.adapters.layer import FixedRankVariant
from qriemann.geometry import FixedRankParameter
from tests.elsewhere import run_elsewhere

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def tiny_llama(seed: int = 0, *, bias: bool = False, layers: int = 2, vocabulary: int = 24) -> LlamaForCausalLM:
    """A Llama with layers of 64 x 64, 32 x 64, 96 x 64 and 64 x 96; with `bias`, biases that are not zero."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def save_tiny_base(folder: Path, seed: int = 0) -> Path:
    """A folder that `load_nf4` and a process without qriemann can load the same base from."""
    tiny_llama(seed).save_pretrained(folder)
    return folder


def load_nf4(folder: Path) -> PreTrainedModel:
    """The model of `folder`, every linear layer but the head in NF4 with double quantization, computing in float32."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )


def with_lora(model: nn.Module, *, seed: int = 1, **options: Any) -> PeftModel:
    """`model` with a fresh LoRA adapter on all linear layers, as PEFT makes it (B = 0)."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**{**settings, **options}))


def fill_lora(model: nn.Module, seed: int = 2, scale: float = 0.1) -> None:
    """Gives every plain LoRA layer of `model` a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def move_points(points: list[FixedRankParameter], seed: int = 3, scale: float = 0.3) -> None:
    """Gives every point a random full core, so that nothing is hidden by a zero or a diagonal S."""
    generator = torch.Generator().manual_seed(seed)
    for point in points:
        point.s.copy_(scale * torch.randn(point.rank, point.rank, generator=generator))


def variants(model: nn.Module) -> dict[str, tuple[nn.Module, FixedRankParameter]]:
    """Every layer on the manifold with its point, by name."""
    return {
        name: (module, module.lora_variant["default"].point)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_variant", {}).get("default"), FixedRankVariant)
    }


def dequantized(model: nn.Module) -> nn.Module:
    """`tiny_llama` with the values that the 4-bit weights of `model`, with an adapter or without, stand for."""
    reference = tiny_llama()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            reference.get_parameter(f"{plain}.weight").data = weight.clone()
    return reference


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every byte of the model: packed weights and their quantization state, parameters, buffers, points and offsets."""
    kept = {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            kept |= {f"{name}.{k}": v.clone() for k, v in module.weight.quant_state.as_dict(packed=True).items()}
    for name, (_, point) in variants(model).items():
        parts = [*point.point(), *(point.offset or ())]
        kept |= {f"{name}.lora_{index}": part.clone() for index, part in enumerate(parts)}
    return kept


def assert_unchanged(model: nn.Module, before: dict[str, Tensor], *, frozen: bool = False) -> None:
    """That the model is what `snapshot` saw; with `frozen`, all of it but the adapter."""
    after = snapshot(model)
    assert frozen or after.keys() == before.keys()
    for name, value in before.items():
        if not frozen or "lora_" not in name:
            assert value.dtype == after[name].dtype, name
            assert torch.equal(value, after[name]), name


def token_batch(seed: int = 4, rows: int = 2, length: int = 9, vocabulary: int = 24) -> Tensor:
    return torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """In eval mode; the model is left in the mode that it was in."""
    training = model.training
    with torch.no_grad():
        found = model.eval()(token_batch() if ids is None else ids).logits
    model.train(training)
    return found


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of the mapping in the file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


def same_bits(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a prompt-completion dataset needs no chat template."""
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )


def counting_rows(rows: int = 24) -> Dataset:
    """Text to learn: counting from a word on, so that rows differ and a few steps change something."""
    return Dataset.from_list([{"text": " ".join(WORDS[i % 8 : i % 8 + 5])} for i in range(rows)])


def trainer_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a TRL config for a short run on the CPU that reports to nobody."""
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        # TRL's own default, under the name that does not warn.
        "activation_checkpointing": True,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }


def logits_under_plain_peft(adapters: list[tuple[Path, bool, Path]], ids: Tensor) -> list[Tensor]:
    """Logits of base + adapter for each saved adapter, from a process in which `import qriemann` raises.

    Args:
        adapters: for each the base model's folder, whether to quantize it as `load_nf4` does, and the folder PEFT saved.
        ids: (rows, length) tokens.
    """
    source = """
result = []
for folder, nf4, adapter in adapters:
    model = PeftModel.from_pretrained(load_base(folder, nf4), adapter).eval()
    with torch.no_grad():
        result.append(model(torch.tensor(ids)).logits)
"""
    return run_elsewhere(source, adapters=[(str(b), q, str(a)) for b, q, a in adapters], ids=ids.tolist())


def next_token_loss(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    logits = model(input_ids=ids, **options).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Iterable[int]) -> list[float]:
    """A step on the batch of each seed; returns the losses before them."""
    losses = []
    for seed in seeds:
        model.zero_grad()
        loss = next_token_loss(model, token_batch(seed))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def dense_gradients(reference: nn.Module, model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """dL/dX of every layer on the manifold, m x n, by autograd in float64 on W + s (X - X_0) made dense.

    Args:
        reference: the base model, unquantized and without adapter.
        model: the same with its adapter on the manifold.
        batches: the loss is summed over them.
    """
    reference = copy.deepcopy(reference).double().eval()
    leaves, weights = {}, {}
    for name, (module, point) in variants(model).items():
        base_name = f"{name.removeprefix('base_model.model.')}.weight"
        leaf = leaves[name] = point.point().dense().requires_grad_()
        frozen = 0 if point.offset is None else point.offset.dense()
        weights[base_name] = reference.get_parameter(base_name).detach() + module.scaling["default"] * (leaf - frozen)

    class Patched(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            return torch.func.functional_call(reference, weights, kwargs={"input_ids": input_ids})

    torch.stack([next_token_loss(Patched(), ids) for ids in batches]).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def assert_blocks_match(model: nn.Module, gradients: dict[str, Tensor], rtol: float) -> None:
    """Every layer's .grad against G V and (G^T U)^T, relative in the Frobenius norm."""
    found = variants(model)
    assert found.keys() == gradients.keys()
    for name, (_, point) in found.items():
        u, _, v = (part.double() for part in point.point())
        g = gradients[name]
        assert g.norm() > 1e-6, name
        assert relative(point.u.grad, g @ v) < rtol, name
        assert relative(point.v_transposed.grad.mT, g.mT @ u) < rtol, name
