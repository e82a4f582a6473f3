"""The recipes for real cards: their heads quote `plan`, and each trains a small model of its architecture."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from qriemann.config import load_settings
from qriemann.memory.footprint import GIB
from qriemann.memory.plan import plan
from qriemann.training.prepare import prepare
from qriemann.training.train import train
from tests.recipe_fixtures import chat_rows, make_tokenizer

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "cards").glob("*.yaml"))

# As published; what is not written here does not change the size of anything.
_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
_LLAMA = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8}
_QWEN = {"vocab_size": 151936, "max_position_embeddings": 40960, "num_hidden_layers": 36, "head_dim": 128, **_HEADS}
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, **_HEADS}
_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
PUBLISHED: dict[str, PreTrainedConfig] = {
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(**_LLAMA | _8B),
    "meta-llama/Meta-Llama-3-8B": LlamaConfig(**_LLAMA | _8B),
    "meta-llama/Llama-3.2-3B": LlamaConfig(**_LLAMA | _3B, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B-Instruct": LlamaConfig(**_LLAMA | _3B, tie_word_embeddings=True),
    "mistralai/Mistral-7B-Instruct-v0.3": MistralConfig(
        **_8B, vocab_size=32768, max_position_embeddings=32768, sliding_window=None
    ),
    "Qwen/Qwen3-8B": Qwen3Config(**_QWEN, hidden_size=4096, intermediate_size=12288),
    "Qwen/Qwen3-4B": Qwen3Config(**_QWEN, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
}

_HEAD = re.compile(r"^# (\d+) GB: qriemann train (\S+)(.*)\n#   plan: peak ([\d.]+) GiB$", re.MULTILINE)


def heads():
    """(recipe, card in GB, arguments, peak in GiB) of every command in the recipes' heads."""
    for path in RECIPES:
        for card, _, arguments, peak in _HEAD.findall(path.read_text()):
            yield pytest.param(path, int(card), shlex.split(arguments), float(peak), id=f"{path.stem} {card} GB")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "card", "arguments", "peak"), list(heads()))
def test_the_head_of_a_recipe_says_what_the_plan_says_and_the_card_holds_it(path, card, arguments, peak, tmp_path):
    PUBLISHED[load_settings(path).model_name_or_path].save_pretrained(tmp_path)
    result = plan(load_settings(path, [*arguments, "--model_name_or_path", str(tmp_path)]))
    assert result.peak / GIB == pytest.approx(peak, abs=0.06)
    assert result.high <= card * GIB


def test_every_recipe_names_its_command_and_its_card():
    assert RECIPES
    for path in RECIPES:
        commands = _HEAD.findall(path.read_text())
        assert commands, path
        assert {command[1] for command in commands} == {f"recipes/cards/{path.name}"}


def small(config: PreTrainedConfig, vocabulary: int) -> PreTrainedConfig:
    """The same architecture with two narrow layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return type(config)(
        **sizes, **heads, vocab_size=vocabulary, tie_word_embeddings=config.tie_word_embeddings, pad_token_id=None
    )


def rows_like(columns: dict[str, str] | None, name: str) -> list[dict[str, str]]:
    """Rows with the columns of the recipe's dataset."""
    if columns:
        return [{column: f"{column} {n}" for column in columns} for n in range(12)]
    if "messages" in name:
        return chat_rows(12)
    if name.endswith(".jsonl"):
        return [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(12)]
    return [{"instruction": f"say {n}", "input": "", "output": f"it is {n}"} for n in range(12)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_a_small_model_of_its_architecture(path, tmp_path):
    written = load_settings(path)
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    published = PUBLISHED[written.model_name_or_path]
    AutoModelForCausalLM.from_config(small(published, len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    name = written.dataset_name
    rows = rows_like(written.dataset_columns, "messages" if "ultrachat" in name else name)
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    arguments = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "rows.jsonl",
        "dataset_train_split": "train",
        "dataset_test_split": "train",
        "dataset_eval_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "lora_r": 4,
        "use_cpu": "true",
        "display": "none",
    }
    config = load_settings(path, [word for key, value in arguments.items() for word in (f"--{key}", str(value))])
    result = train(prepare(config))
    result.trainer.end()
    assert result.steps == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
