"""A tiny chat model on disk, random adapters for it, and what a process without qriemann makes of both."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from qriemann.release.atomic_folder import Released
from qriemann.release.merge import merge
from tests.elsewhere import run_elsewhere
from tests.models import fill_lora, with_lora
from tests.recipe_fixtures import chat_llama, make_tokenizer
from tests.release.folders import adapter_folder

PROMPTS = [f"say {n}" for n in range(20)]


def save_chat_base(
    folder: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "100KB",
    tokenizer: Any = None,
    **changes: Any,
) -> Path:
    """A Llama of two layers (64 x 64, 32 x 64, 96 x 64, 64 x 96) over bytes, and its tokenizer with a chat template."""
    tokenizer = tokenizer or make_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 1, "initializer_range": 0.1, **changes}
    chat_llama(tokenizer, seed, **sizes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[tuple[str, str]], system: str = "") -> Path:
    """A file of prompts, as conversations, and right answers."""
    before = [{"role": "system", "content": system}] if system else []
    lines = [{"prompt": [*before, {"role": "user", "content": prompt}], "answer": answer} for prompt, answer in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_adapter(base: Path, folder: Path, *, seed: int = 1, **options: Any) -> Path:
    """A plain LoRA adapter with random factors, as PEFT saves it."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(base), seed=seed, **options)
    fill_lora(model, seed, scale=0.05)
    for name, parameter in model.named_parameters():
        if any(
            part in name for part in ("modules_to_save.default", "trainable_tokens_delta", "lora_B.default.bias")
        ) or (options.get("bias") and name.endswith(".bias")):
            # Not the sum alone: a head that has the same added everywhere gives the same probabilities.
            parameter.data = 1.5 * parameter.data + 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_base(tmp_path_factory.mktemp("release") / "base")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        return save_adapter(base, tmp_path_factory.mktemp("release") / "adapter")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out rows with prompt and answer."""
    path = tmp_path_factory.mktemp("release") / "held_out.jsonl"
    return write_rows(path, [(prompt, f"it is {n}") for n, prompt in enumerate(PROMPTS)])


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `qriemann train` leaves, not to be written into."""
    return adapter_folder(tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished_run, tmp_path / "adapter"))


@pytest.fixture(autouse=True)
def _proof_in_the_shared_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process of a proof is the shared one, but for session fixtures, which start their own."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        source = 'import runpy\nresult = runpy.run_path(script)["main"](request)'
        run_elsewhere(source, script=command[-2], request=command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("qriemann.evaluation.proof.subprocess", SimpleNamespace(run=run))


@dataclass(frozen=True)
class Merged:
    """One merge into every base, and what it printed."""

    result: Released
    shown: str


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory, adapter: Path, rows: Path) -> Merged:
    console = Console(file=io.StringIO(), width=140)
    out = tmp_path_factory.mktemp("merged") / "out"
    result = merge(adapter, out, into=["original", "nf4-dequantized", "nf4"], data=str(rows), console=console)
    return Merged(result, console.file.getvalue())


def greedy_elsewhere(model: Path, tokenizer: Path, adapter: Path | None = None, tokens: int = 12) -> list[list[int]]:
    """Greedy tokens after each prompt, from a process in which `import qriemann` raises."""
    source = """
model = load_base(model, nf4=bool(adapter))
if adapter:
    model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
result = []
for prompt in prompts:
    text = tokenizer.apply_chat_template(
        [dict(role="user", content=prompt)], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.eval().generate(**ids, max_new_tokens=tokens, do_sample=False)
    result.append(output[0, ids["input_ids"].shape[1] :].tolist())
"""
    names = {"model": str(model), "adapter": str(adapter or ""), "tokenizer": str(tokenizer)}
    return run_elsewhere(source, prompts=PROMPTS, tokens=tokens, **names)
