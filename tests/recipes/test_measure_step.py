"""`measure step` on a model of two tiny shapes: its report against facts known without it."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from qriemann.optim.methods import METHODS

MEASURE = Path(__file__).parents[2] / "recipes" / "measure"
sys.path.insert(0, str(MEASURE))
SHAPES = ((24, 16), (16, 40))
LAYERS, RANK, ROUNDS = 3, 4, 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench_step():
    module = importlib.import_module("bench_step")
    module.MODELS["tiny"] = (LAYERS, SHAPES)
    # The machine's caches are not what is tested.
    module._EVICTED_BYTES = 4096
    yield module
    del module.MODELS["tiny"]


@pytest.fixture(scope="module")
def main(bench_step):
    specification = importlib.util.spec_from_file_location("measure_main", MEASURE / "__main__.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def report(main, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "out" / "report.json"
    options = f"step --model tiny --rank {RANK} --rounds {ROUNDS} --warmup 1 --device cpu --json {path}"
    assert main(options.split()) == 0
    return json.loads(path.read_text())


# Rows of all factors of the tiny model: 3 x (24 + 16 + 16 + 40).
TALL_BYTES = 4 * RANK * 288
CORE_BYTES = 4 * RANK**2 * 6
# torch's AdamW keeps one float32 step counter for each of the 12 factors.
STEP_BYTES = 4 * 12


def test_every_method_has_a_row_that_ran_or_says_why(bench_step, report):
    results = report["results"]
    assert {"riemannion-offset" if name == "riemannion" else name for name in METHODS} <= results.keys()
    assert results.keys() == bench_step.ENTRIES.keys()
    assert [name for name, record in results.items() if not record["ran"]] == ["riemannion-triton"]
    assert "need a CUDA device" in results["riemannion-triton"]["reason"]


@pytest.mark.parametrize(
    ("name", "state", "floor"),
    [
        ("riemannion-offset", TALL_BYTES + CORE_BYTES, 5 * TALL_BYTES + 2 * CORE_BYTES),
        # Two averages of squared norms and a count for each of the 6 layers.
        ("riemannlora", TALL_BYTES + CORE_BYTES + 4 * 3 * 6, 5 * TALL_BYTES + 2 * CORE_BYTES),
        # It keeps the momentum's core apart from its tall parts.
        ("per-layer", TALL_BYTES + 2 * CORE_BYTES, 5 * TALL_BYTES + 2 * CORE_BYTES),
        ("scaled-adamw", 2 * TALL_BYTES + STEP_BYTES, 7 * TALL_BYTES),
        ("scaled-gd", 0, 3 * TALL_BYTES),
        ("peft-riemannian", 2 * TALL_BYTES + STEP_BYTES, 7 * TALL_BYTES),
        ("adamw-fused", 2 * TALL_BYTES + STEP_BYTES, 7 * TALL_BYTES),
        ("adamw-foreach", 2 * TALL_BYTES + STEP_BYTES, 7 * TALL_BYTES),
        ("muon", TALL_BYTES, 5 * TALL_BYTES),
    ],
)
def test_state_and_floor_are_counted_to_the_byte(report, name, state, floor):
    record = report["results"][name]
    assert (record["state_bytes"], record["floor_bytes"]) == (state, floor)


def five_steps(bench_step, names, change=lambda contenders: None):
    """The contenders after five steps on the same gradients."""
    gradients = bench_step.Gradients(SHAPES, RANK, CPU, seed=0)
    contenders = [bench_step.ENTRIES[name].build(SHAPES, RANK, CPU) for name in names]
    change(contenders)
    for turn in range(5):
        for contender in contenders:
            gradients.leave(contender.pairs, turn)
            contender.optimizer.step()
    return contenders


def test_the_loop_takes_the_same_steps_as_the_optimizer(bench_step):
    ours, loop = (
        [b.data @ s @ a.data for (b, a), s in zip(contender.pairs, contender.cores, strict=True)]
        for contender in five_steps(bench_step, ("riemannion-offset", "per-layer"))
    )
    for x, y in zip(ours, loop, strict=True):
        # Float32 in QR and SVD; the smallest singular values of the momentum are 1e-2 of its largest.
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


def test_scaled_adamw_computes_what_pefts_optimizer_over_adamw_does(bench_step):
    def with_pefts_damping_and_decay(contenders):
        for group in contenders[0].optimizer.param_groups:
            group["damping"], group["weight_decay"] = 1e-2, contenders[1].optimizer.defaults["weight_decay"]

    ours, theirs = five_steps(bench_step, ("scaled-adamw", "peft-riemannian"), with_pefts_damping_and_decay)
    for mine, other in zip(sum(ours.pairs, ()), sum(theirs.pairs, ()), strict=True):
        # Entries of 1e-2 and more, moved by 1e-4 a step.
        torch.testing.assert_close(mine.data, other.data, rtol=0, atol=1e-7)


def test_a_row_that_fails_says_why_and_the_others_go_on(bench_step, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no room\nleft")

    refusing = dataclasses.replace(bench_step.ENTRIES["muon"], what="refuses", build=refuse)
    monkeypatch.setitem(bench_step.ENTRIES, "muon", refusing)
    results = bench_step.measure(SHAPES, RANK, ["muon", "adamw-fused"], rounds=1, warmup=0, device=CPU)
    assert results["muon"] == {"what": "refuses", "ran": False, "reason": "RuntimeError: no room left"}
    assert results["adamw-fused"]["ran"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model tiny --only adam", "--only must name some of"),
        ("--model tiny --rank 17", "--rank must be at most 16"),
        ("--model tiny --layers 4", "--layers must be at most 3"),
        ("--model /nowhere", "--model must be one of"),
    ],
)
def test_bad_input_is_one_line(main, capsys, arguments, said):
    assert main(["step", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
