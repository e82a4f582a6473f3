"""Loss, perplexity and exact match against their definitions, and intervals against known ones."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import qriemann
from qriemann.cli import main
from qriemann.evaluation.evaluate import Evaluation, difference, evaluate, wilson
from tests.release.conftest import save_chat_base, write_rows


def test_the_loss_is_that_of_the_answers_tokens(base, adapter, rows):
    (found,) = evaluate(adapter, str(rows), max_rows=5)
    quantized, tokenizer = qriemann.load_base(base)
    model = PeftModel.from_pretrained(quantized, adapter).eval()
    losses, tokens = [], []
    for line in map(json.loads, rows.read_text().splitlines()[:5]):
        prompt = tokenizer.apply_chat_template(line["prompt"], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(f"{prompt}{line['answer']}<|im_end|>")["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1]
        losses.append(F.cross_entropy(logits, ids[0, start:], reduction="sum").item())
        tokens.append(ids.shape[1] - start)
    assert found.tokens == tokens
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert found.loss.value == pytest.approx(sum(losses) / sum(tokens), rel=1e-4)
    assert found.perplexity.value == pytest.approx(math.exp(sum(losses) / sum(tokens)), rel=1e-4)
    assert found.loss.low < found.loss.value < found.loss.high


def save_parrot(folder: Path, text: str) -> Path:
    """A model that answers the same text to everything: each token's embedding is the head's row of the next."""
    save_chat_base(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        chain = [*tokenizer(f"\n{text}")["input_ids"], tokenizer.eos_token_id]
        for token, following in pairwise(chain):
            model.lm_head.weight[following] += model.model.embed_tokens.weight[token]
    model.save_pretrained(folder)
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    return folder


def test_exact_match_counts_the_rows_whose_answer_is_the_right_one(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [(f"say {n}", "yes" if n % 5 else "no") for n in range(20)])
    (found,) = evaluate(save_parrot(tmp_path / "parrot", "yes"), str(path))
    assert found.answers == ["yes"] * 20
    assert found.scores == [float(n % 5 > 0) for n in range(20)]
    assert found.score == wilson(16, 20)


def test_wilsons_interval_is_the_published_one():
    """Newcombe (1998), table I: 81 of 263 and 0 of 20, method 3."""
    interval = wilson(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    interval = wilson(0, 20)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0, 0.1611)


def evaluation(losses: np.ndarray, right: np.ndarray) -> Evaluation:
    return Evaluation("m", losses.tolist(), [10] * len(losses), ["a"] * len(losses), right.astype(float).tolist())


def test_the_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    losses = np.random.default_rng(1).normal(20, 3, 400)
    found = evaluation(losses, losses > 0).loss
    half = 1.96 * losses.std(ddof=1) / math.sqrt(400) / 10
    assert found.value == pytest.approx(losses.mean() / 10)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_a_paired_comparison_sees_a_difference_that_two_intervals_hide():
    """Rows differ much more than the models do; each row's difference is nearly the same."""
    generator = np.random.default_rng(2)
    losses = generator.normal(20, 8, 60)
    first = evaluation(losses, np.arange(60) < 30)
    second = evaluation(losses - 0.5 + generator.normal(0, 0.2, 60), np.arange(60) < 33)
    assert second.loss.high > first.loss.low
    found = difference(first, second)
    assert found["loss"].value == pytest.approx(-0.05, abs=0.01)
    assert found["loss"].high < 0
    assert found["score"].value == pytest.approx(0.05)


def test_two_models_are_compared_in_one_table_and_file(base, adapter, rows, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(["eval", str(base), str(adapter), str(rows), "--max-rows", "4", "--output", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert [one["model"] for one in figures] == ["base", "adapter"]
    assert figures[0]["loss"]["value"] != figures[1]["loss"]["value"]
    shown = capsys.readouterr().out
    assert f"{figures[0]['loss']['value']:.4f}" in shown
    assert "second - first" in shown


def test_missing_data_is_one_line(base, tmp_path, capsys):
    assert main(["eval", str(base), str(tmp_path / "gone.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
