"""The held-out rows of an evaluation are read as a training reads them."""

from qriemann.evaluation.rows import load_rows
from tests.recipe_fixtures import make_tokenizer


def test_answers_are_the_text_of_their_cells_and_belong_to_the_rows_that_count(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,answer,question,label,topic\na,007,q,true,t\nb,bad,,False,\nc,NA,,true,\n")
    found = load_rows(str(path), make_tokenizer())
    assert found.answers == ["007", "NA"]
    assert [extra["question"] for extra in found.extra] == ["q", ""]
    assert len(found.rows) == 2
    assert any(
        "1 of 3 rows of rows.csv (train) say that they are not to be learnt" in notice for notice in found.notices
    )
    assert "not used: topic (1 of 3 rows)" in found.notices


def test_the_answer_takes_the_place_of_the_last_turn(write_rows):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "old"}]
    tokenizer = make_tokenizer()
    found = load_rows(str(write_rows([{"messages": turns, "answer": 7}])), tokenizer)
    assert found.answers == ["7"]
    assert tokenizer.decode(found.rows[0]["targets"]) == "7<|im_end|>"
