"""The page of what is trained, read back: its colours against the labels, its prompts against what chat sends."""

import html
import json
import re

import pytest
import yaml

from qriemann import cli
from qriemann.chat.session import Session
from qriemann.data.account import take_account
from qriemann.data.row_formats import RowEncoder
from qriemann.data.sources import Source
from qriemann.data.tokenized import IGNORED, tokenize_rows
from qriemann.release.report import write_report
from qriemann.training.rows_page import SAMPLE_ROWS, describe_rows, preview, write_page
from tests.recipe_fixtures import chat_llama, chat_rows, make_tokenizer
from tests.release.folders import records

TALK = [
    {"role": "system", "content": "Be odd."},
    {"role": "user", "content": "say\n1"},
    {"role": "assistant", "content": "it is 1"},
    {"role": "user", "content": "say 2"},
    {"role": "assistant", "content": " it is 2\n"},
    {"role": "user", "content": "say 3"},
    {"role": "assistant", "content": "it is 3"},
]


@pytest.fixture(scope="module")
def model(tokenizer):
    return chat_llama(tokenizer)


@pytest.fixture
def look(tokenizer, model, tmp_path):
    """The tokens of rows, what is described of them, and the page."""

    def at(rows, held_out=None, *, tokenizer=tokenizer, loss_on="assistant", **options):
        source = Source.of(rows, "rows")
        held_out = held_out and Source.of(held_out, "held out")
        data = tokenize_rows(source, held_out, tokenizer, loss_on=loss_on, **options)
        limit = options.get("max_length")
        encoder = RowEncoder(tokenizer, loss_on, "text")
        described = describe_rows(source, data, take_account(data, tokenizer, model, limit), encoder, tokenizer, limit)
        path = tmp_path / "check.html"
        write_page(path, described, data.notices)
        return data, described, path.read_text()

    return at


def pieces_of(page):
    """For each <pre> of the page its pieces: (kind, source, number of tokens, text), markup and entities resolved."""
    piece = re.compile(
        r'<(?:span|mark|del|ins) class="(\w+)" title="[^"]*"(?: data-source="([^"]*)")? data-tokens="(\d+)">'
        r"(.*?)</(?:span|mark|del|ins)>(?=<|$)",
        re.DOTALL,
    )
    found = []
    for block in re.findall(r"<pre>(<(?:span|mark|del|ins) class.*?)</pre>", page, re.DOTALL):
        block = block.replace("<i></i>", "")
        assert piece.sub("", block) == ""
        found.append([(k, html.unescape(s), int(n), html.unescape(text)) for k, s, n, text in piece.findall(block)])
    return found


def coloured(pieces):
    """Whether each token is in a trained piece."""
    return [kind == "trained" for kind, _, count, _ in pieces for _ in range(count)]


def sources(pieces):
    return [(source, text) for kind, source, _, text in pieces if kind == "trained"]


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        ({"messages": TALK}, True, ["messages, turn 3", "messages, turn 5", "messages, turn 7"]),
        ({"messages": TALK[1:3], "system": "Be odd."}, True, ["messages, turn 2"]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            True,
            ["conversations, turn 2"],
        ),
        ({"prompt": TALK[:4], "completion": TALK[4:5]}, True, ["completion, turn 1"]),
        ({"prompt": "say 1: ", "completion": "1"}, False, ["completion"]),
        (
            {"instruction": "say", "input": "1", "output": "1", "history": [["a", "b"]]},
            True,
            ["history, turn 2", "output"],
        ),
        ({"instruction": "say", "input": "1", "output": "1"}, False, ["output"]),
        ({"text": "all of it"}, False, ["text"]),
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, True, ["labels"]),
    ],
)
def test_exactly_the_tokens_with_a_label_are_coloured_and_name_their_origin(look, row, template, expected):
    tokenizer = make_tokenizer() if template else make_tokenizer(None)
    data, _, page = look([row], tokenizer=tokenizer)
    pieces = pieces_of(page)[0]
    ids, labels = data.train[0]["input_ids"], data.train[0]["labels"]
    assert coloured(pieces) == [place > 0 and label != IGNORED for place, label in enumerate(labels)]
    assert [source for source, _ in sources(pieces)] == expected
    assert "".join(text for *_, text in pieces) == tokenizer.decode(ids)
    trained = [token for token, label in zip(ids[1:], labels[1:], strict=True) if label != IGNORED]
    assert "".join(text for _, text in sources(pieces)) == tokenizer.decode(trained)


def test_an_answer_that_the_template_rewrites_later_names_its_own_turn(look):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ m['content'][3:] if m['role'] == 'assistant' and not loop.last else m['content'] }}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    data, _, page = look([{"messages": TALK[1:]}], tokenizer=make_tokenizer(template))
    shown = pieces_of(page)[::2]
    assert [sources(pieces) for pieces in shown] == [
        [(f"messages, turn {turn}", f"{TALK[turn]['content']}<|im_end|>")] for turn in (2, 4, 6)
    ]
    assert [coloured(pieces) for pieces in shown] == [[x != IGNORED for x in labels] for labels in data.train["labels"]]


def test_the_preview_sets_off_exactly_the_trained_tokens(look, tokenizer):
    data, described, _ = look(chat_rows(3))
    for number, (title, text) in enumerate(preview(described)):
        coloured = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
        assert coloured == f"[it is {number}<|im_end|>]"
        assert title.startswith(f"row {number + 1},")
        assert text.plain.replace(coloured, coloured[1:-1]) == tokenizer.decode(data.train[number]["input_ids"])


def test_what_is_cut_is_shown_as_cut(look):
    limit = 90
    data, _, page = look([{"messages": TALK}, *chat_rows(2)], max_length=limit)
    kinds = [kind for kind, _, count, _ in pieces_of(page)[0] for _ in range(count)]
    assert kinds[limit:] == ["cut"] * (len(data.train[0]["input_ids"]) - limit)
    assert "cut" not in kinds[:limit]
    # Chat's prompt is compared with that of the last answer that is left.
    assert "".join(text for _, _, _, text in pieces_of(page)[1]).endswith("say 2<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("turns", [TALK[:3], TALK[:5], TALK, TALK[1:]])
def test_the_prompt_beside_a_row_is_what_chat_sends_for_the_same_turns(look, model, tokenizer, turns):
    _, described, page = look([{"messages": turns}])
    sent = []
    session = Session(model, tokenizer, "tiny", history=[dict(turn) for turn in turns[:-2]])
    # What chat remembers of an answer has no space around it.
    for turn in session.history:
        turn["content"] = turn["content"].strip() if turn["role"] == "assistant" else turn["content"]
    session.settings.max_new_tokens = 1
    watch = model.register_forward_pre_hook(
        lambda _, __, given: sent.append(given["input_ids"][0].tolist()), with_kwargs=True
    )
    session.ask(turns[-2]["content"], lambda _: None)
    watch.remove()
    _, pieces = pieces_of(page)
    assert "".join(text for kind, *_, text in pieces if kind != "read") == tokenizer.decode(sent[0])
    assert sum(count for kind, _, count, _ in pieces if kind != "read") == len(sent[0])
    # The answer with space around it is the only thing that the two do not share.
    assert [text for kind, *_, text in pieces if kind != "same"] == ([" ", "\n"] if len(turns) > 5 else [])
    assert described["sample"][0]["chat"]["differing"] == (2 if len(turns) > 5 else 0)


def test_a_prompt_that_was_trained_as_plain_text_differs_from_chats_by_its_template(look, tokenizer):
    _, _, page = look([{"prompt": "say 1: ", "completion": "1"}])
    _, pieces = pieces_of(page)
    assert "".join(text for kind, *_, text in pieces if kind in ("same", "read")) == "say 1: "
    sent = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say 1: "}], tokenize=False, add_generation_prompt=True
    )
    assert "".join(text for kind, *_, text in pieces if kind in ("same", "sent")) == sent


def test_nothing_of_a_row_is_markup_or_drives_a_terminal(look):
    evil = '</pre></mark><script>alert("x")</script>\x1b[31m\u202e&amp;'
    rows = [{"messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}], evil: 1}]
    _, described, page = look(rows)
    assert "<script" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)
    assert described["unused"] == {evil: 1}
    assert described["sample"][0]["findings"] == [f"not trained: {evil}"]
    shown = evil.replace("\x1b", "[U+001B]").replace("\u202e", "[U+202E]")
    assert [text for _, text in sources(pieces_of(page)[0])] == [f"{shown}<|im_end|>"]
    assert html.escape(shown, quote=True).replace("&quot;", "&#34;") in page
    # Nothing is loaded from anywhere, and nothing needs a script.
    assert not re.findall(r"\b(?:src|href|http|url\()", page)


def test_a_page_of_many_rows_stays_small_and_counts_all(look, tokenizer):
    end = tokenizer.eos_token_id
    made = [[*tokenizer(f"say {n}")["input_ids"], end] for n in range(5000)]
    made[4000] = [*tokenizer("word " * 3000)["input_ids"], end]
    made[4500] = made[4499]
    rows = [{"input_ids": ids, "labels": [*[IGNORED] * (len(ids) - 1), end]} for ids in made]
    rows[17]["labels"][-1] = IGNORED
    _, described, page = look(rows, rows[:30], allow=["no-trained-token"])
    assert described["rows"] == {"all": 5030, "training": 4999, "held out": 29}
    findings = dict(described["findings"])
    assert findings["every token is masked"] == [2, 0, 0]
    assert findings["a copy of an earlier row"] == [1, 1, 0]
    assert findings["in the training and the held-out rows"] == [58, 29, 29]
    numbers = [row["row"] for row in described["sample"]]
    assert len(numbers) <= SAMPLE_ROWS
    assert {18, 4001, 4501} <= set(numbers)
    assert len(json.dumps(described)) < 60_000
    assert len(page) < 80_000
    # Where the middle of a row is not shown, its tokens still count.
    (longest,) = (row for row in described["sample"] if row["row"] == 4001)
    assert sum(piece["tokens"] for piece in longest["pieces"]) == longest["tokens"] == len(made[4000])
    assert longest["pieces"][0]["gap"] > 10_000


def test_check_writes_the_page_before_it_refuses_the_rows(tmp_path, settings, write_rows, capsys):
    template = tmp_path / "endless.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    given = {
        **settings,
        "dataset_name": str(write_rows(chat_rows(4))),
        "eval_size": 0,
        "chat_template_path": str(template),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    page = tmp_path / "page.html"
    assert cli.main(["check", str(tmp_path / "run.yaml"), "--html", str(page)]) == 2
    assert "--allow end-token-untrained" in capsys.readouterr().err
    assert "without a trained end" in page.read_text()
    assert len(pieces_of(page.read_text())) == 8
    assert cli.main(["check", str(tmp_path / "run.yaml"), "--html", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "folder that exists" in capsys.readouterr().err


def test_a_report_shows_what_the_run_was_trained_on(look, tmp_path):
    data, described, _ = look([{"messages": TALK}])
    records(tmp_path)
    (tmp_path / "trained_rows.json").write_text(json.dumps(described))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    pieces = pieces_of(page)[0]
    assert coloured(pieces) == [label != IGNORED for label in data.train[0]["labels"]]
