"""lm-evaluation-harness on a model whose every answer is known."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from qriemann.cli import main
from tests.evaluation.test_evaluate import save_parrot

INSTALLED = importlib.util.find_spec("lm_eval") is not None

TASK = """\
task: say_yes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")
@pytest.mark.filterwarnings("default")
def test_a_task_of_the_harness_finds_the_share_of_rows_that_are_answered_right(tmp_path, capsys):
    """A parrot that says yes to everything, and 16 of 20 rows where that is right."""
    rows, task, out = tmp_path / "rows.jsonl", tmp_path / "say_yes.yaml", tmp_path / "figures.json"
    lines = [{"question": f"say {n}", "answer": "yes" if n % 5 else "no"} for n in range(20)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task.write_text(TASK.format(rows=rows))
    parrot = save_parrot(tmp_path / "parrot", "yes")
    assert main(["eval", str(parrot), "--tasks", str(task), "--output", str(out)]) == 0
    (found,) = json.loads(out.read_text())
    assert found["model"] == "parrot"
    assert found["results"]["say_yes"]["exact_match,none"] == 16 / 20
    assert "0.8000" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")
def test_a_task_that_the_harness_has_not_is_one_line(tmp_path, capsys):
    assert main(["eval", str(tmp_path), "--tasks", "no_such_task"]) == 2
    message = capsys.readouterr().err
    assert "no_such_task" in message
    assert message.count("\n") == 1


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_harness_one_line_says_how_to_get_it(tmp_path: Path, capsys):
    assert main(["eval", str(tmp_path), "--tasks", "gsm8k"]) == 2
    message = capsys.readouterr().err
    assert "pip install lm-eval" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["DIR"], ["DIR", "DIR2", "DIR3", "rows"], ["DIR", "--tasks", "x", "--scorer", "exact"]]
)
def test_models_rows_and_tasks_that_do_not_go_together_are_one_line(words: list[str], capsys):
    assert main(["eval", *words]) == 2
    message = capsys.readouterr().err
    assert "eval must be given" in message
    assert message.count("\n") == 1
