"""A conversation against transformers' own generation on the same prompt."""

import pytest
import torch
from transformers import AutoTokenizer

from qriemann.chat.session import load_session
from qriemann.errors import InputError


@pytest.fixture
def session(adapter_folder):
    session = load_session(adapter_folder, quantize="none", device="cpu")
    session.settings.max_new_tokens = 24
    return session


def silent(piece):
    """Takes a piece of an answer and forgets it."""


def greedy(model, folder, messages, count=24):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=count, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160)).strip()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_answers_are_the_models_greedy_ones_with_the_whole_conversation_before_them(session, plain, adapter_folder):
    session.reset("Be odd.")
    pieces = []
    first, _ = session.ask("hello", pieces.append)
    second, _ = session.ask("and then?", silent)
    start = [{"role": "system", "content": "Be odd."}, user("hello")]
    assert first == greedy(plain, adapter_folder, start)
    assert second == greedy(plain, adapter_folder, [*start, assistant(first), user("and then?")])
    assert second != first
    assert "".join(pieces).strip() == first
    assert len(pieces) > 1


def test_the_base_answers_as_without_the_adapter_and_the_adapter_is_on_again(
    session, plain, base_folder, adapter_folder
):
    with_adapter, _ = session.ask("hello", silent)
    history = list(session.history)
    pieces = []
    session.ask_base("hello", pieces.append)
    with plain.disable_adapter():
        of_base = greedy(plain, base_folder, [user("hello")])
    assert "".join(pieces).strip() == of_base
    assert of_base != with_adapter
    assert session.history == history
    session.reset()
    assert session.ask("hello", silent)[0] == with_adapter


@pytest.mark.parametrize("of_base", [False, True])
def test_an_answer_that_is_interrupted_keeps_what_was_said_and_the_next_one_is_whole(session, of_base):
    whole, _ = session.ask("hello", silent)
    session.reset()
    said = []

    def interrupt(piece):
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        (session.ask_base if of_base else session.ask)("hello", interrupt)
    if not of_base:
        assert session.history[-1] == assistant("".join(said).strip())
        assert whole.startswith("".join(said).strip())
    session.reset()
    assert session.ask("hello", silent)[0] == whole


def test_the_oldest_turns_go_when_the_context_is_full_and_the_system_prompt_stays(session):
    session.reset("Be odd.")
    dropped = [session.ask(f"question {n} " + "x" * 60, silent)[1] for n in range(8)]
    assert sum(dropped) > 0
    assert session.history[0] == {"role": "system", "content": "Be odd."}
    assert [message["role"] for message in session.history[1:]] == ["user", "assistant"] * (len(session.history) // 2)
    assert session.history[-2]["content"].startswith("question 7")


def test_a_question_longer_than_the_context_is_refused(session):
    with pytest.raises(InputError, match="longer than the context of 640 tokens"):
        session.ask("x" * 2000, silent)
    assert session.history == []


def test_a_seed_makes_sampling_repeat_itself(session):
    session.settings.change("temperature", "1.5")
    answers = []
    for seed in ("7", "7", "8"):
        session.settings.change("seed", seed)
        session.reset()
        answers.append(session.ask("hello", silent)[0])
    assert answers[0] == answers[1] != answers[2]


def test_what_would_drive_the_terminal_is_not_handed_on(session):
    session.settings.max_new_tokens = 400
    session.settings.change("temperature", "5")
    session.settings.change("seed", "0")
    raw = []
    decode = session.tokenizer.decode
    session.tokenizer.decode = lambda *a, **k: raw.append(text := decode(*a, **k)) or text
    answer, _ = session.ask("hello", silent)
    control = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
    assert control & set("".join(raw))
    assert not control & set(answer)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "-1"), ("temperature", "warm"), ("top_p", "0"), ("max_new_tokens", "1.5"), ("tempo", "1")],
)
def test_a_setting_that_cannot_be_is_refused_and_nothing_changes(session, name, value):
    before = vars(session.settings).copy()
    with pytest.raises(InputError, match=name):
        session.settings.change(name, value)
    assert vars(session.settings) == before


def test_a_merged_model_is_talked_to_without_an_adapter(plain, adapter_folder, tmp_path):
    plain.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(adapter_folder).save_pretrained(tmp_path / "merged")
    session = load_session(tmp_path / "merged", device="cpu")
    session.settings.max_new_tokens = 8
    model = plain.base_model.model
    assert session.base is None
    assert session.ask("hello", silent)[0] == greedy(model, adapter_folder, [user("hello")], 8)


def test_what_the_chat_template_refuses_is_one_line_and_the_conversation_stays(session):
    session.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    before = list(session.history)
    with pytest.raises(InputError, match="refuses the conversation: no system role"):
        session.ask("one", silent)
    assert session.history == before
