"""Each defect of a dataset, carried by a small file into a run that stops at it, or says it."""

import json
import re

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from qriemann import cli
from qriemann.base.chat_template import end_tokens
from qriemann.data.account import take_account
from qriemann.data.defects import find_defects, refuse
from qriemann.data.sources import Source
from qriemann.data.tokenized import TokenizedData, tokenize_rows
from qriemann.errors import InputError
from tests.recipe_fixtures import CHATML, chat_rows, make_tokenizer

# A template that closes no turn.
ENDLESS = CHATML.replace("+ '<|im_end|>' + '\n'", "+ '\n'").replace("Be brief.<|im_end|>", "Be brief.")


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.fixture
def run(tmp_path, settings):
    """Trains one step through the command line on a file of rows; its exit status and the run.json it left."""

    def start(path, *arguments, template=CHATML):
        asked = {**settings, "dataset_name": str(path), "max_steps": 1, "eval_size": 0, "display": "plain"}
        if template != CHATML:
            (tmp_path / "template.jinja").write_text(template)
            asked["chat_template_path"] = str(tmp_path / "template.jinja")
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(asked))
        status = cli.main(["train", str(tmp_path / "run.yaml"), *arguments])
        report = tmp_path / "out" / "run.json"
        return status, json.loads(report.read_text()) if report.exists() else None

    return start


def defects_of(data, tokenizer, model, max_length=None):
    return find_defects(take_account(data, tokenizer, model, max_length), tokenizer)


def names(found):
    return [defect.name for defect in found]


def tokenized(rows, held_out=None):
    """Data as if it had come so from a tokenizer: every token trained."""
    parts = [Dataset.from_dict({"input_ids": ids, "labels": ids}) if ids else None for ids in (rows, held_out)]
    return TokenizedData(parts[0], parts[1], "input_ids")


def test_an_end_token_that_is_never_trained_stops_the_run_unless_it_is_allowed(run, write_rows, capsys):
    path = write_rows(chat_rows())
    status, report = run(path, template=ENDLESS)
    error = capsys.readouterr().err.splitlines()[-1]
    assert (status, report) == (2, None)
    assert "'<|im_end|>'" in error
    assert "none of 12 rows" in error
    assert "--allow end-token-untrained" in error
    status, report = run(path, "--allow", "end-token-untrained", template=ENDLESS)
    assert status == 0
    assert report["config"]["allow"] == ["end-token-untrained"]
    assert "allowed: none of 12 rows" in capsys.readouterr().out


def test_an_end_token_that_truncation_cuts_off_counts_as_untrained(model, tokenizer):
    data = tokenize_rows(Source(Dataset.from_list(chat_rows()), "rows"), None, tokenizer)
    shortest = min(len(ids) for ids in data.train["input_ids"])
    # The end token is the last but a newline.
    assert names(defects_of(data, tokenizer, model, max_length=shortest - 2)) == ["end-token-untrained"]
    assert names(defects_of(data, tokenizer, model, max_length=shortest)) == []


def test_the_templates_own_end_of_turn_counts_as_an_end(model):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end in end_tokens(tokenizer, model)
    model_without = torch.nn.Module()
    assert end_tokens(make_tokenizer(ENDLESS), model_without) == [turn_end]


def test_a_row_without_a_trained_token_stops_the_run_or_is_left_out(run, write_rows, capsys):
    rows = chat_rows(3)
    rows[1]["messages"].pop()
    path = write_rows(rows)
    status, report = run(path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert (status, report) == (2, None)
    assert "row 2" in error
    assert "--allow no-trained-token" in error
    status, report = run(path, "--allow", "no-trained-token")
    assert status == 0
    assert report["data"]["train_rows"] == 2
    assert any("1 of 3 rows" in notice for notice in report["data"]["notices"])


def ids_of(rows, **changes):
    """Chat rows as tokens under a tokenizer with changed special tokens, and that tokenizer."""
    tokenizer = make_tokenizer(changes.pop("template", CHATML))
    for name, token in changes.items():
        setattr(tokenizer, name, token)
    return tokenize_rows(Source(Dataset.from_list(rows), "rows"), None, tokenizer), tokenizer


def found_in(case, tokenizer, model):
    end, size = tokenizer.eos_token_id, model.get_input_embeddings().weight.shape[0]
    match case:
        case "end-token-rare":
            return tokenized([[1, 2, end], [1, 2], [3, 4], [5, 6]]), tokenizer
        case "token-outside-embedding":
            return tokenized([[1, size, end]]), tokenizer
        case "rows-in-both-splits":
            return tokenized([[1, 2, end], [1, 3, end]], held_out=[[1, 3, end], [1, 4, end]]), tokenizer
        case "doubled-bos":
            template = "{{ '<|im_start|><|im_start|>' }}" + CHATML
            return ids_of(chat_rows(5), template=template, bos_token="<|im_start|>")
        case "pad-is-end":
            return ids_of(chat_rows(), pad_token="<|im_end|>")


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("end-token-rare", r"trained in only 1 of 4 rows"),
        ("token-outside-embedding", r"token (\d+) .* outside the embedding's \1 rows"),
        ("rows-in-both-splits", "^1 of 2 held-out rows"),
        ("doubled-bos", "doubled at the start of 5 of 5 rows"),
        ("pad-is-end", "both the pad token and an end token"),
    ],
)
def test_a_defect_of_the_tokens_is_named_with_its_count(case, problem, model, tokenizer):
    (found,) = defects_of(*found_in(case, tokenizer, model), model)
    assert found.name == case
    assert re.search(problem, found.problem)


def test_all_defects_are_noted_before_the_first_error_stops(model, tokenizer):
    rows = model.get_input_embeddings().weight.shape[0]
    found = defects_of(tokenized([[1, rows], [2, 3]], held_out=[[2, 3]]), tokenizer, model)
    noted = []
    with pytest.raises(InputError, match=rf"token {rows} .* outside the embedding"):
        refuse(found, ["end-token-untrained"], noted.append)
    assert [note.split(",")[0].split(" (")[0] for note in noted] == [
        "allowed: none of 2 rows trains the end of a turn",
        "1 of 1 held-out rows are also training rows",
    ]
