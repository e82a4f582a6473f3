"""A byte-level tokenizer with a ChatML template and a random Llama of a few thousand weights, both saved where asked."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from qriemann import cli
from qriemann.config import settings_from
from qriemann.optim.methods import METHODS
from qriemann.training.prepare import prepare
from qriemann.training.train import TrainResult, train

# SmolLM2's template: no generation markers, a default system prompt, a newline after every end token.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(
    template: str | None = CHATML, merges: Sequence[tuple[str, str]] = (("Ċ", "Ċ"),), *, words: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte and for each merge; with `words` no merge goes beyond a word, as in GPT-2's."""
    # By default a merge of two newlines, so that a token can straddle the end of "assistant\n".
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *map("".join, merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    core.decoder = decoders.ByteLevel()
    return with_turns(core, template)


def with_turns(core: Tokenizer, template: str | None = CHATML, **special: str) -> PreTrainedTokenizerFast:
    """The tokenizer with ChatML's special tokens and a template."""
    names = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{**names, **special})
    tokenizer.chat_template = template
    return tokenizer


def chat_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of hidden size 32 and two layers for the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Path:
    """A local model folder: hidden size 32, two layers, weights by the seed."""
    chat_llama(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_on(values: dict[str, Any], *, callbacks: Sequence[TrainerCallback] = (), **given: Any) -> TrainResult:
    """The whole way from settings to a result, as `qriemann train` goes it; `given` goes to `prepare`."""
    return train(prepare(settings_from(with_rate(values)), **given), callbacks=callbacks)


def train_in(folder: Path, base: str | Path, rows: Sequence[dict[str, Any]], **changes: Any) -> TrainResult:
    """A short run on these rows; they are left in rows.jsonl of the folder, the run in its folder `run`."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(base),
        "dataset_name": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "run"),
        "lora_r": 4,
        "per_device_train_batch_size": 4,
        "display": "none",
        "use_cpu": True,
    }
    return train_on({**settings, **changes})


def with_rate(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with the method's own learning rate, because random weights leave nothing to measure."""
    method = METHODS.get(values.get("method", "riemannion"))
    return {"learning_rate": method.defaults["lr"].value, **values} if method else values


def run_cli(tmp_path: Path, settings: dict[str, Any], *arguments: str) -> int:
    """`qriemann train` on these settings, and its exit status."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(with_rate(settings)))
    return cli.main(["train", str(path), *arguments])


def chat_rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(count)
    ]
