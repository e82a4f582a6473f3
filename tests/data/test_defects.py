"""Each defect of a dataset, carried by a small file into a run that stops at it, or says it."""

import json

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from qriemann import cli
from qriemann.data.account import end_tokens, take_account
from qriemann.data.defects import find_defects, preview, refuse
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


def test_rows_without_a_defect_have_none(model, tokenizer):
    data = tokenize_rows(Source(Dataset.from_list(chat_rows()), "rows"), None, tokenizer, eval_size=3)
    assert defects_of(data, tokenizer, model) == []


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


def test_an_end_token_in_few_rows_is_said(model, tokenizer):
    end = tokenizer.eos_token_id
    assert names(defects_of(tokenized([[1, 2, end], [1, 2], [3, 4], [5, 6]]), tokenizer, model)) == ["end-token-rare"]


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


def test_rows_that_all_lack_a_trained_token_are_refused_whatever_is_allowed(run, write_rows, capsys):
    rows = [{"messages": [{"role": "user", "content": "a"}]}]
    assert run(write_rows(rows), "--allow", "no-trained-token") == (2, None)
    assert "every token is masked" in capsys.readouterr().err


def test_a_template_that_changes_the_history_stops_the_run(run, write_rows, capsys):
    rewriting = CHATML.replace("message['content'] + '<|im_end|>'", "message['content'][:loop.index] + '<|im_end|>'")
    rewriting = rewriting.replace("[:loop.index]", "[: (9 if loop.last else 1)]")
    turns = [("user", "ab"), ("assistant", "cd"), ("user", "ef"), ("assistant", "gh")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    assert run(write_rows(rows), template=rewriting) == (2, None)
    assert "renders differently once it is answered" in capsys.readouterr().err


def test_a_token_outside_the_embedding_stops_the_run(model, tokenizer):
    rows = model.get_input_embeddings().weight.shape[0]
    found = defects_of(tokenized([[1, rows, tokenizer.eos_token_id]]), tokenizer, model)
    assert names(found) == ["token-outside-embedding"]
    with pytest.raises(InputError, match=rf"token {rows} .* outside the embedding's {rows} rows"):
        refuse(found, [], print)


def test_a_bos_token_that_the_template_doubles_is_said(model):
    tokenizer = make_tokenizer("{{ '<|im_start|><|im_start|>' }}" + CHATML)
    tokenizer.bos_token = "<|im_start|>"
    data = tokenize_rows(Source(Dataset.from_list(chat_rows(5)), "rows"), None, tokenizer)
    (found,) = defects_of(data, tokenizer, model)
    assert found.name == "doubled-bos"
    assert "5 of 5" in found.problem


def test_a_pad_token_that_ends_turns_is_said(model):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    data = tokenize_rows(Source(Dataset.from_list(chat_rows()), "rows"), None, tokenizer)
    assert names(defects_of(data, tokenizer, model)) == ["pad-is-end"]


def test_held_out_rows_that_are_trained_on_are_counted(model, tokenizer):
    rows = chat_rows(8)
    train, held_out = Dataset.from_list(rows), Dataset.from_list([*rows[2:4], *chat_rows(20)[15:]])
    data = tokenize_rows(Source(train, "train"), Source(held_out, "test"), tokenizer)
    (found,) = defects_of(data, tokenizer, model)
    assert found.name == "rows-in-both-splits"
    assert found.problem.startswith("2 of 7")


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


def test_the_preview_sets_off_exactly_the_trained_tokens(tokenizer):
    data = tokenize_rows(Source(Dataset.from_list(chat_rows(3)), "rows"), None, tokenizer)
    first, second = preview(data.train, tokenizer)
    for number, text in enumerate((first, second)):
        coloured = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
        assert coloured == f"[it is {number}<|im_end|>]"
        assert text.plain.replace(coloured, coloured[1:-1]) == tokenizer.decode(data.train[number]["input_ids"])
