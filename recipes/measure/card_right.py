"""The parts of `measure on_a_card` that ask whether a card computes what the CPU and float64 do."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
import torch
import yaml
from bitsandbytes import functional
from card_model import Report, byte_tokenizer, llama_config, save_llama, token_rows, write_chat_rows
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import qriemann
from qriemann import cli
from qriemann.adapters.layer import float32_product
from qriemann.cli.doctor import findings


def relative(found: Tensor, right: Tensor) -> float:
    """Frobenius norm of the difference, relative, in float64."""
    right = right.double().cpu()
    return ((found.double().cpu() - right).norm() / right.norm().clamp_min(1e-300)).item()


def basics(report: Report) -> None:
    """The installation, the 4-bit codes against the CPU's, and products against float64."""
    device, generator = report.device, torch.Generator().manual_seed(0)
    report.tell("machine", bench.machine(device))
    found = {one.what: one.found + (f" -> {one.remedy}" if one.remedy else "") for one in findings()}
    report.tell("doctor", found)
    rows = 256 if report.small else 4096
    matrix = torch.randn(rows, 1024, generator=generator)
    (ours, state), (theirs, right) = (
        functional.quantize_4bit(matrix.to(place), quant_type="nf4", compress_statistics=True)
        for place in (device, "cpu")
    )
    report.tell(
        "nf4: share of packed bytes unlike the CPU's", (ours.cpu() != theirs).double().mean().item(), at_most=1e-4
    )
    dense = functional.dequantize_4bit(ours, state), functional.dequantize_4bit(theirs, right)
    report.tell("nf4: dequantized, against the CPU", relative(*dense), at_most=1e-3)
    tokens = 1024 if report.small else 16384
    left, other = (torch.randn(tokens, n, generator=generator).bfloat16() for n in (512, 16))
    exact = left.double().mT @ other.double()
    # TensorFloat-32 would leave 3e-4, sums in bfloat16 3e-3.
    product = relative(float32_product(left.to(device), other.to(device)), exact)
    report.tell("float32 product of bfloat16 inputs", product, at_most=1e-5)
    tall = torch.randn(14336, 64, generator=generator)
    found = tall.to(device).mT @ tall.to(device)
    report.tell("float32 gram of 14336 rows", relative(found, tall.double().mT @ tall.double()), at_most=1e-5)


def commands(report: Report) -> None:
    """The command line from end to end: train, resume, eval, merge, export, chat."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = llama_config(64, 2) if report.small else llama_config(512, 8)
        settings: dict[str, Any] = {
            "model_name_or_path": str(save_llama(folder / "base", config, torch.bfloat16)),
            "dataset_name": str(write_chat_rows(folder / "rows.jsonl", 200)),
            "lora_r": 8,
            "lora_dropout": 0.1,
            "max_steps": 30,
            "save_strategy": "steps",
            "save_steps": 15,
            "save_total_limit": 5,
            "per_device_train_batch_size": 4,
            "max_length": 256,
            "eval_size": 8,
            "display": "none",
            "use_cpu": report.device.type == "cpu",
        }
        for quantize in ("nf4", "none"):
            _train_and_resume(report, folder, {**settings, "quantize": quantize})
        _use(report, folder)


def _train_and_resume(report: Report, folder: Path, settings: dict[str, Any]) -> None:
    kind = settings["quantize"]
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(settings), "utf-8")

    def train(out: Path, *arguments: str) -> int:
        return cli.main(["train", str(file), "--output_dir", str(out), *arguments])

    whole, again, resumed = (folder / f"{kind}-{name}" for name in ("whole", "again", "resumed"))
    report.tell(f"train, {kind}: exit status", train(whole), at_most=0)
    run = json.loads((whole / "run.json").read_text("utf-8"))
    report.tell(f"train, {kind}: result", run["result"], right=run["result"]["train_loss"] is not None)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-30")
    report.tell(f"resume, {kind}: exit status", train(resumed, "--resume", "true"), at_most=0)
    # Attention's backward adds up in no fixed order on some cards: then two whole runs differ as much.
    apart = 0.0
    if report.device.type == "cuda":
        train(again)
        apart = _furthest(whole, again)
        report.tell(f"two whole runs, {kind}: largest difference of a factor", apart)
    report.tell(f"resumed, {kind}: largest difference of a factor", _furthest(whole, resumed), at_most=2 * apart)


def _furthest(one: Path, other: Path) -> float:
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)


def _use(report: Report, folder: Path) -> None:
    adapter, rows = str(folder / "nf4-whole"), str(folder / "rows.jsonl")
    few = folder / "few.jsonl"
    few.write_text("".join(Path(rows).read_text("utf-8").splitlines(keepends=True)[:8]), "utf-8")
    report.tell("eval: exit status", cli.main(["eval", adapter, str(few)]), at_most=0)
    merged = folder / "merged"
    # Random weights are a wreck on the 4-bit grid, whatever a merge does; the figure below is what counts.
    bases = ["nf4-dequantized", "original", "nf4"]
    status = cli.main(["merge", adapter, str(merged), "--into", *bases, "--data", str(few), "--max-kl", "100"])
    report.tell("merge: exit status", status, at_most=0)
    for one in json.loads((merged / "merge_report.json").read_text("utf-8"))["merged"]:
        bound = 1e-5 if one["into"] == "nf4-dequantized" else None
        report.tell(f"merge, {one['into']}: mean KL", one["mean_kl"], at_most=bound)
    status = cli.main(
        ["export", adapter, str(folder / "exported"), "--rank", "4", "--data", str(few), "--max-kl", "100"]
    )
    report.tell("export: exit status", status, at_most=0)
    stdin = sys.stdin
    try:
        sys.stdin = io.StringIO("/set max_new_tokens 8\nsay 4\n")
        report.tell("chat: exit status", cli.main(["chat", adapter]), at_most=0)
    finally:
        sys.stdin = stdin


def numbers(report: Report) -> None:
    """A model with its adapter against the same model without, and the blocks against float64's gradient."""
    config = llama_config(64, 2) if report.small else llama_config(256, 4)
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).eval()
    batches = [torch.tensor(token_rows(2, [48], config.vocab_size, seed)["input_ids"]) for seed in (0, 1)]
    exact = LlamaForCausalLM(config).double()
    exact.load_state_dict(plain.state_dict())
    torch.stack([exact(input_ids=ids, labels=ids).loss for ids in batches]).sum().backward()
    gradients = {name.removesuffix(".weight"): parameter.grad for name, parameter in exact.named_parameters()}
    for dtype, logits_bound, block_bound in ((torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-2, 1e-1)):
        _compare(report, plain, batches, gradients, dtype, logits_bound, block_bound)
    steps = 10 if report.small else 60
    ours, theirs = (_losses(config, place, steps) for place in (report.device, torch.device("cpu")))
    furthest = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    report.tell(f"{steps} steps: largest relative difference of the loss from the CPU's", furthest, at_most=1e-2)
    report.tell(f"{steps} steps: loss", [ours[0], ours[-1]], right=ours[-1] < ours[0])


def _compare(
    report: Report,
    plain: Any,
    batches: list[Tensor],
    gradients: dict[str, Tensor],
    dtype: torch.dtype,
    logits_bound: float,
    block_bound: float,
) -> None:
    """The blocks under autocast, checkpointing and two microbatches."""
    device, kind = report.device, str(dtype).removeprefix("torch.")
    model = LlamaForCausalLM(plain.config).to(device)
    model.load_state_dict(plain.state_dict())
    model.requires_grad_(False)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), cast:
        before = model.eval()(input_ids=batches[0].to(device)).logits
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    points = qriemann.attach(peft, seed=0)
    with torch.no_grad(), cast:
        after = peft.eval()(input_ids=batches[0].to(device)).logits
    report.tell(f"{kind}: logits with the adapter against without", relative(after, before), at_most=logits_bound)
    peft.train()
    for ids in batches:
        with cast:
            loss = peft(input_ids=ids.to(device), labels=ids.to(device)).loss
        loss.backward()
    errors = []
    for point in points:
        gradient = gradients[point.name.removeprefix("base_model.model.")]
        u, v = point.u.detach().double().cpu(), point.v_transposed.detach().double().cpu().mT
        errors += [relative(point.u.grad, gradient @ v), relative(point.v_transposed.grad, (gradient.mT @ u).mT)]
    report.tell(f"{kind}: worst tangent block against float64", max(errors), at_most=block_bound)


def _losses(config: Any, device: torch.device, steps: int) -> list[float]:
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).to(device)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora)
    qriemann.attach(peft, seed=0)
    optimizer = qriemann.Riemannion(peft, lr=5e-3)
    tokenizer, losses = byte_tokenizer(), []
    for step in range(steps):
        text = " ".join(f"{n} and {n} is {2 * n};" for n in range(step % 5, step % 5 + 4))
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
        loss = peft(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
