"""The comparison of starts: its summary against numbers worked out by hand, and a short run of the real thing."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def compare_starts(monkeypatch):
    # As Python does for a script: the folder's other recipes can be imported.
    monkeypatch.syspath_prepend(RECIPES)
    specification = importlib.util.spec_from_file_location("compare_starts", RECIPES / "compare_starts.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    sys.modules.pop("quickstart", None)


def record(init, alpha, losses):
    start = "zero" if alpha is None else "offset"
    return {"init": init, "start": start, "lr": 0.02, "alpha": alpha, "seed": 0, "losses": losses}


def test_the_summary_is_the_mean_over_seeds_with_the_lowest_first(compare_starts):
    runs = [
        record("random", None, [4.0, 3.0, 3.0, 2.0]),
        record("random", None, [4.0, 4.0, 4.0, 4.0]),
        record("loi", 0.5, [2.0, 2.0, 1.0, 1.0]),
        record("loi", 0.5, [2.0, 2.0, 2.0, 2.0]),
    ]
    first, second = compare_starts.summarize(runs)
    assert first == {
        "start": "gradient bases, offset, alpha 0.5, lr 0.02",
        "mean": 1.75,
        "spread": pytest.approx(math.sqrt(0.125)),  # 1.5 and 2
        "end": 1.5,
    }
    assert (second["start"], second["mean"], second["end"]) == ("random bases, S = 0, lr 0.02", 3.5, 3.0)


def test_one_seed_has_no_spread(compare_starts):
    (row,) = compare_starts.summarize([record("loi", None, [2.0])])
    assert row == {"start": "gradient bases, S = 0, lr 0.02", "mean": 2.0, "spread": None, "end": 2.0}


@pytest.mark.slow
def test_every_start_runs_on_the_embedded_model_from_the_same_loss(compare_starts, tmp_path, capsys):
    path = tmp_path / "out" / "starts.json"
    arguments = ["--seeds", "1", "--steps", "2", "--batches", "1", "--alphas", "0.5", "1", "--json", str(path)]
    assert compare_starts.main(arguments) == 0
    runs = json.loads(path.read_text())["runs"]
    assert {(run["init"], run["alpha"]) for run in runs} == {
        (init, alpha) for init in ("loi", "random") for alpha in (None, 0.5, 1.0)
    }
    first = runs[0]["losses"][0]
    assert all(len(run["losses"]) == 2 for run in runs)
    # The function at the start is the base's, and the first batch is the same.
    assert [run["losses"][0] for run in runs] == pytest.approx([first] * 6, rel=1e-4)
    assert "training loss, nats a token (steps: 2, seeds: 1)" in capsys.readouterr().out
