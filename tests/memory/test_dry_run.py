"""The dry run finds what would go wrong, and leaves the run exactly as it would have been."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qriemann import cli
from qriemann.config import settings_from
from qriemann.errors import InputError
from qriemann.memory.footprint import Footprint, read_run
from qriemann.memory.plan import plan
from qriemann.training.check import check
from qriemann.training.prepare import prepare
from qriemann.training.train import train
from tests.recipe_fixtures import chat_rows, train_on


@pytest.fixture
def settings(settings):
    return {
        **settings,
        "lora_dropout": 0.2,
        "max_steps": 3,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_size": 4,
        "use_cpu": True,
    }


def test_a_run_is_the_same_to_the_bit_with_and_without_it(settings, tmp_path, capsys):
    adapters, logged = [], []
    for name in ("with", "without"):
        folder = tmp_path / name
        train_on({**settings, "output_dir": str(folder), "dry_run": name == "with"}).trainer.end()
        adapters.append(load_file(folder / "adapter_model.safetensors"))
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        keys = ("step", "loss", "eval_loss", "num_tokens", "entropy")
        logged.append([{key: line.get(key) for key in keys} for line in lines])
    assert capsys.readouterr().out.count("dry run: the longest batch, 2 rows") == 1
    assert logged[0] == logged[1]
    for name, tensor in adapters[0].items():
        assert torch.equal(tensor, adapters[1][name]), name


PACKED = {"packing": True, "eval_strategy": "no"}


def test_samples_that_see_each_other_stop_the_run_unless_it_is_allowed(settings, tmp_path):
    mixing = {**settings, **PACKED, "packing_strategy": "wrapped"}
    with pytest.raises(InputError, match=r"packed samples see each other.*--allow packing-mixes-samples"):
        train_on(mixing)
    assert not (tmp_path / "out").exists()
    result = train_on({**mixing, "allow": ["packing-mixes-samples"]})
    result.trainer.end()
    assert result.steps == 3
    apart = {**settings, **PACKED, "packing_strategy": "bfd", "max_length": 256, "output_dir": str(tmp_path / "apart")}
    result = train_on(apart)
    result.trainer.end()
    assert result.steps == 3


def test_the_check_measures_shows_and_touches_no_folder(settings, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["check", str(tmp_path / "run.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "[it is " in printed
    assert "longest training batch, 2 x" in printed
    assert "longest evaluation batch, 4 x" in printed
    assert not (tmp_path / "out").exists()
    account = (prepared := prepare(settings_from(settings), to_train=False)).account
    assert (len(account.train), len(account.held_out)) == (20, 4)
    assert account.train.trained.sum() < account.train.lengths.sum()
    assert check(prepared).defects == ()


def test_what_was_checked_is_not_trained(settings):
    """The check's step has moved the adapter."""
    prepared = prepare(settings_from(settings))
    check(prepared)
    with pytest.raises(InputError, match="call prepare again"):
        train(prepared)
    assert not Path(settings["output_dir"]).exists()


def test_the_check_counts_what_the_plan_foretells(settings, write_rows):
    rows = chat_rows(8)
    for row in rows:
        row["messages"][1]["content"] = "x" * 100
    config = settings_from(
        {
            **settings,
            "dataset_name": str(write_rows(rows, "long.jsonl")),
            "gradient_accumulation_steps": 1,
            "per_device_eval_batch_size": 1,
            "allow": ["end-token-untrained"],
        }
    )
    result = check(prepare(config))
    # Every row of the longest batch is cut at max_length, so the plan is about this very batch.
    assert result.training.tokens == 64
    computed = Footprint.computed(*read_run(config, dense_copies=False))[1].total()
    assert result.training.counted == pytest.approx(computed, rel=0.1)


def test_an_evaluation_that_will_not_fit_stops_the_check_by_name(settings):
    config = settings_from({**settings, "per_device_eval_batch_size": 16, "eval_size": 16})
    measured = check(prepare(config))
    assert measured.evaluation.counted > measured.training.counted
    # Between what the two batches take: what is held is the same.
    between = 0.5 * (measured.evaluation.counted - measured.training.counted) / 2**30
    held = sum(size for _, size in plan(config, dense_copies=False).stored[:-1])
    card = (held + measured.training.counted) / 2**30 + between
    with pytest.raises(InputError, match=r"evaluation batch of the 16 longest.*--allow evaluation-too-large"):
        check(prepare(config), card)
    allowed = settings_from(
        {**settings, "per_device_eval_batch_size": 16, "eval_size": 16, "allow": ["evaluation-too-large"]}
    )
    assert [defect.name for defect in check(prepare(allowed), card).defects] == ["evaluation-too-large"]
