"""The rules for a right answer, on answers whose verdict a person would not doubt."""

from __future__ import annotations

import json

import pytest

from qriemann.cli import main
from qriemann.errors import InputError
from qriemann.evaluation.evaluate import evaluate, wilson
from qriemann.evaluation.scorers import SCORERS, find_scorer
from tests.evaluation.test_evaluate import save_parrot
from tests.release.conftest import write_rows

CASES = [
    ("exact", "blue", "blue", 1),
    ("exact", "Blue", "blue", 0),
    ("last-number", "48 / 2 = 24, and 48 + 24 = 72. #### 72", "She sold 24 in May.\n#### 72", 1),
    ("last-number", "So it is $1,250.00.", "#### 1250", 1),
    ("last-number", "#### 72 because 24 is half of it", "72", 0),
    ("last-number", "-3", "3", 0),
    ("last-number", "I do not know.", "72", 0),
    ("choice", "(B) Paris", "B", 1),
    ("choice", "b", "B. Paris", 1),
    ("choice", "I think the answer is: C, since A is a river.", "C", 1),
    ("choice", "Answer: (D)", "D", 1),
    ("choice", "A, not B", "B", 0),
    ("choice", "", "B", 0),
    ("choice", "Yes, it is.", "yes", 1),
    ("contains", "It was Ada Lovelace.", "ada lovelace", 1),
    ("contains", "There are 12.", "1", 0),
]


@pytest.mark.parametrize(("scorer", "said", "right", "score"), CASES)
def test_an_answer_is_scored_as_a_person_would(scorer, said, right, score):
    assert find_scorer(scorer).prepare(right, {})(said) == score


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym", reason="the extra scorers is not installed")


@pytest.mark.parametrize("as_text", [False, True])
def test_reasoning_gym_scores_an_answer_as_the_data_set_that_made_it(as_text, gym):
    data = gym.create_dataset("countdown", size=3, seed=1)
    for entry in data:
        row = {**entry, "metadata": json.dumps(entry["metadata"]) if as_text else entry["metadata"]}
        score = find_scorer("reasoning-gym").prepare(entry["answer"], row)
        for said in (entry["answer"], f"({entry['answer']})", "1 + 1", "none"):
            assert score(said) == data.score_answer(said, entry)


@pytest.mark.parametrize(
    ("scorer", "right", "row", "named"),
    [
        ("last-number", "many", {}, "a number"),
        ("choice", "?!", {}, "a word"),
        ("reasoning-gym", "1", {}, "source_dataset"),
    ],
)
def test_a_row_that_a_rule_cannot_judge_is_refused_before_anything_is_answered(scorer, right, row, named):
    with pytest.raises(InputError, match=named):
        find_scorer(scorer).prepare(right, row)


def test_a_data_set_that_reasoning_gym_lacks_is_refused(gym):
    with pytest.raises(InputError, match="rocket_science"):
        find_scorer("reasoning-gym").prepare("1", {"metadata": {"source_dataset": "rocket_science"}})


def test_an_unknown_scorer_is_one_line_that_lists_them(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [("add 1", "1")])
    assert main(["eval", str(tmp_path), str(path), "--scorer", "best"]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in SCORERS)
    assert message.count("\n") == 1


def test_eval_scores_by_the_rule_that_was_named(tmp_path):
    parrot = save_parrot(tmp_path / "parrot", "so 4")
    path = write_rows(tmp_path / "rows.jsonl", [(f"add {n}", f"#### {n % 5}") for n in range(10)])
    figures = tmp_path / "figures.json"
    assert main(["eval", str(parrot), str(path), "--scorer", "last-number", "--output", str(figures)]) == 0
    (found,) = json.loads(figures.read_text())
    assert found["scorer"] == "last-number"
    assert found["scores"] == [float(n % 5 == 4) for n in range(10)]
    assert found["score"]["value"] == wilson(2, 10).value


def test_the_metadata_of_a_row_reaches_the_scorer(tmp_path, gym):
    """Without it no data set is named, and the row would be refused."""
    data = gym.create_dataset("chain_sum", size=4, seed=0)
    parrot = save_parrot(tmp_path / "parrot", "so 4")
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": entry["question"], "answer": entry["answer"], "metadata": json.dumps(entry["metadata"])}
        for entry in data
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = evaluate(parrot, str(path), scorer="reasoning-gym")
    expected = [data.score_answer(said, entry) for said, entry in zip(found.answers, data, strict=True)]
    assert found.scores == expected
    assert found.score.value == pytest.approx(sum(expected) / 4)
