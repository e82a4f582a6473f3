"""A tiny chat model on disk, random adapters for it, and processes that cannot import qriemann."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qriemann.release.atomic_folder import Released
from qriemann.release.merge import merge
from tests.models import fill_lora
from tests.recipe_fixtures import make_tokenizer
from tests.release.folders import adapter_folder

PROMPTS = [f"say {n}" for n in range(20)]


def save_chat_base(
    folder: Path, seed: int = 0, *, dtype: torch.dtype = torch.float32, shard: str = "100KB", **changes: Any
) -> Path:
    """A Llama of two layers (64 x 64, 32 x 64, 96 x 64, 64 x 96) over bytes, and its tokenizer with a chat template."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """A file of prompts, as conversations, and right answers."""
    lines = [{"prompt": [{"role": "user", "content": prompt}], "answer": answer} for prompt, answer in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_adapter(base: Path, folder: Path, *, seed: int = 1, **options: Any) -> Path:
    """A plain LoRA adapter with random factors, as PEFT saves it."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**settings, **options}))
    fill_lora(model, seed, scale=0.05)
    for name, parameter in model.named_parameters():
        if "modules_to_save.default" in name or (options.get("bias") and name.endswith(".bias")):
            parameter.data = parameter.data + 0.1
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


_WITHOUT_QRIEMANN = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qriemann":
            raise ImportError(name + " is not installed in this process")

sys.meta_path.insert(0, Refuse())
try:
    import qriemann
except ImportError:
    pass
else:
    raise SystemExit("qriemann could be imported")

import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

torch.set_num_threads(1)
nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
model = AutoModelForCausalLM.from_pretrained(
    {model!r}, dtype=torch.float32, quantization_config=nf4 if {adapter!r} else None
)
for layer in model.modules():
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False
if {adapter!r}:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, {adapter!r})
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
texts = []
for prompt in {prompts!r}:
    text = tokenizer.apply_chat_template(
        [dict(role="user", content=prompt)], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.eval().generate(**ids, max_new_tokens={tokens}, do_sample=False)
    texts.append(output[0, ids["input_ids"].shape[1] :].tolist())
open({out!r}, "w").write(json.dumps(texts))
"""


@pytest.fixture
def greedy_elsewhere(tmp_path: Path) -> Callable[..., list[list[int]]]:
    """Greedy tokens after each prompt, from a process in which `import qriemann` raises."""

    def answer(model: Path, tokenizer: Path, adapter: Path | None = None, tokens: int = 12) -> list[list[int]]:
        out = tmp_path / "texts.json"
        names = {"model": str(model), "adapter": str(adapter or ""), "tokenizer": str(tokenizer), "out": str(out)}
        script = _WITHOUT_QRIEMANN.format(prompts=PROMPTS, tokens=tokens, **names)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    return answer
