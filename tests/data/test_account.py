"""The counts over all rows against a plain count, row by row, and the rows that are chosen to be looked at."""

import random

import pytest
from datasets import Dataset, Features, List, Value
from transformers import AutoModelForCausalLM

from qriemann.data.account import FINDINGS, choose_rows, take_account
from qriemann.data.tokenized import IGNORED, TokenizedData
from tests.recipe_fixtures import make_tokenizer

LIMIT = 12


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def bos_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def random_rows(count, seed, end):
    """(tokens, labels) of short rows; some of them are again the first one."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [generator.randrange(100) for _ in range(generator.randrange(2, 20))] + [end]
        labels = [token if generator.random() < 0.5 else IGNORED for token in ids[:-1]] + [end]
        rows.append((ids, labels))
    return [rows[0] if generator.random() < 0.05 else row for row in rows]


def dataset(rows):
    return Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})


def counted(rows, others, end, bos, size):
    """The same findings by definition, one row after the other."""
    found = dict.fromkeys(FINDINGS, 0)
    for place, (ids, labels) in enumerate(rows):
        trained = [i for i in range(1, len(ids)) if labels[i] != IGNORED]
        kept = [i for i in trained if i < LIMIT]
        found["masked"] += not trained
        found["beyond"] += bool(trained) and not kept
        found["cut"] += len(ids) > LIMIT
        found["endless"] += not any(labels[i] == end for i in kept)
        found["copy"] += ids in [before for before, _ in rows[:place]]
        found["elsewhere"] += ids in [other for other, _ in others]
        found["doubled-bos"] += ids[:2] == [bos, bos]
        found["outside"] += max(ids) >= size
    return found


def test_the_counts_are_those_of_a_plain_count_row_by_row(model, bos_tokenizer):
    end, bos = bos_tokenizer.eos_token_id, bos_tokenizer.bos_token_id
    size = model.get_input_embeddings().weight.shape[0]
    train, held_out = random_rows(2500, 0, end), random_rows(300, 1, end)
    train[7] = ([bos, bos, 5, end], [IGNORED, IGNORED, 5, end])
    train[1700] = ([1, size, end], [IGNORED, size, end])
    held_out[4:6] = train[40:42]
    left_out = [([1, 2, 3], [1, IGNORED, IGNORED]), ([4] * 20, [IGNORED] * 15 + [4] * 5), ([9], [9])]
    data = TokenizedData(dataset(train), dataset(held_out), "input_ids", left_out=[dataset(left_out), dataset([])])
    account = take_account(data, bos_tokenizer, model, LIMIT)
    for part, rows, others in (
        (account.train, train, held_out),
        (account.held_out, held_out, train),
        (account.left_out[0], left_out, []),
    ):
        assert {name: part.count(name) for name in FINDINGS} == counted(rows, others, end, bos, size)
        assert part.lengths.tolist() == [len(ids) for ids, _ in rows]
    # Every finding is there to be counted.
    parts = (account.train, account.held_out, *account.left_out)
    assert all(any(part.count(name) for part in parts) for name in FINDINGS)
    assert account.train.largest.max() == size


def test_rows_in_integers_of_another_width_are_the_same_rows(model, tokenizer):
    rows = dataset([([1, 2, 3], [1, 2, 3]), ([4, 5], [4, 5])])
    narrow = rows.select([0]).cast(Features(dict.fromkeys(("input_ids", "labels"), List(Value("int32")))))
    account = take_account(TokenizedData(rows, narrow, "input_ids"), tokenizer, model)
    assert account.held_out.count("elsewhere") == account.train.count("elsewhere") == 1


def test_few_rows_are_chosen_of_many_and_each_finding_is_among_them(model, bos_tokenizer):
    end = bos_tokenizer.eos_token_id
    rows = random_rows(5000, 2, end)
    rows[4321] = ([bos_tokenizer.bos_token_id] * 2 + [end], [IGNORED, IGNORED, end])
    rows[1234] = ([3] * 40 + [end], [3] * 40 + [end])
    rows[2345] = ([7, end], [IGNORED, end])
    account = take_account(TokenizedData(dataset(rows), None, "input_ids"), bos_tokenizer, model, LIMIT)
    chosen = choose_rows(account.train, 20)
    assert 10 <= len(chosen) <= 20
    assert chosen == sorted(set(chosen))
    for holds in account.train.found.values():
        assert holds[chosen].any() == holds.any()
    assert {4321, 1234, 2345} <= set(chosen)
    # Half of what is chosen lies in either half of the file, give or take the findings.
    assert 5 <= sum(index < 2500 for index in chosen) <= 15
    assert choose_rows(account.train, 5000) == list(range(5000))
