"""Templates that write the date, have names, or fail: the rows are the same on any day, and each fault is one line."""

import datetime
from types import SimpleNamespace

import pytest

from qriemann.base.chat_template import render
from qriemann.data.account import take_account
from qriemann.data.defects import find_defects
from qriemann.data.sources import load_sources
from qriemann.data.tokenized import fingerprint, tokenize_rows
from qriemann.errors import InputError
from tests.data.test_chat_templates import ONE, SEVERAL, as_messages, published
from tests.models import tiny_llama
from tests.recipe_fixtures import CHATML, make_tokenizer

# What four families write of today: Llama 3.2, gpt-oss, SmolLM3, Mistral Small.
DATES = ["%d %b %Y", "%Y-%m-%d", "%d %B %Y", "%A"]


@pytest.mark.parametrize("form", DATES)
def test_rows_do_not_depend_on_the_day(form, write_rows, monkeypatch):
    from transformers.utils import chat_template_utils

    tokenizer = make_tokenizer("{{ '<|im_start|>' + strftime_now('" + form + "') }}" + CHATML)
    path = write_rows([{"messages": as_messages(turns)} for turns in (ONE, SEVERAL)])
    prints = set()
    for day in (datetime.datetime(2026, 11, 28), datetime.datetime(2027, 1, 2)):
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda day=day: day))
        data = tokenize_rows(*load_sources(str(path)), tokenizer)
        prints.add(fingerprint(data.train))
        assert any("today's date" in notice for notice in data.notices)
        # Whoever talks to the model has the day of the talk.
        assert day.strftime(form) in render(tokenizer, as_messages(ONE[:1]))
    assert len(prints) == 1


def test_llama_3_2_has_a_fixed_day_and_a_row_may_name_another(write_rows):
    tokenizer = make_tokenizer(published("llama3_2"))
    rows = [
        {"messages": as_messages(ONE)},
        {"messages": as_messages(ONE), "chat_template_kwargs": {"date_string": "May"}},
    ]
    texts = [
        tokenizer.decode(ids)
        for ids in tokenize_rows(*load_sources(str(write_rows(rows))), tokenizer).train["input_ids"]
    ]
    assert ["Today Date: 01 Jan 2025" in text for text in texts] == [True, False]
    assert "Today Date: May" in texts[1]


NAMED = {"default": CHATML, "tool_use": CHATML.replace("Be brief.", "Use tools.")}


def test_rows_with_tools_take_the_template_of_that_name(write_rows):
    tokenizer = make_tokenizer(NAMED)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{"messages": as_messages(ONE)}, {"messages": as_messages(ONE), "tools": [tool]}]
    data = tokenize_rows(*load_sources(str(write_rows(rows))), tokenizer)
    texts = [tokenizer.decode(ids) for ids in data.train["input_ids"]]
    assert ["Use tools." in text for text in texts] == [False, True]
    assert find_defects(take_account(data, tokenizer, tiny_llama(vocabulary=len(tokenizer)), None), tokenizer) == []


def test_named_templates_without_a_default_say_so(write_rows):
    tokenizer = make_tokenizer({"tool_use": CHATML, "rag": CHATML})
    with pytest.raises(InputError, match="no default") as caught:
        tokenize_rows(*load_sources(str(write_rows([{"messages": as_messages(ONE)}]))), tokenizer)
    assert "\n" not in str(caught.value)


BROKEN = {
    "a block that is not closed": (
        "{% for m in messages %}{{ m.content }}",
        "not valid Jinja: .*line 1.*chat_template_path",
    ),
    "an unknown filter": ("{{ messages | no_such_filter }}", "not valid Jinja: .*no_such_filter"),
    "a key that no turn has": ("{{ messages[0].name + '' }}", "row 1 of .*no attribute 'name'.*the template"),
    "a refusal": ("{{ raise_exception('no more') }}", "row 1 of .*no more.*; correct the turns$"),
}


@pytest.mark.parametrize(("template", "line"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("num_proc", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_template_that_fails_is_one_line_with_the_cause(template, line, num_proc, write_rows):
    path = write_rows([{"messages": as_messages(ONE)}] * 3)
    with pytest.raises(InputError, match=line.replace("row 1", "rows 1, 2, 3")) as caught:
        tokenize_rows(*load_sources(str(path)), make_tokenizer(template), num_proc=num_proc)
    assert "\n" not in str(caught.value)
