"""The step benchmark on a model of two tiny shapes: its report against facts that are known without it."""

import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from qriemann.optim.methods import METHODS

RECIPE = Path(__file__).parents[2] / "recipes" / "bench_step.py"
sys.path.insert(0, str(RECIPE.parent))
SHAPES = ((24, 16), (16, 40))
LAYERS, RANK, ROUNDS = 3, 4, 5


@pytest.fixture(scope="module")
def bench_step():
    module = importlib.import_module("bench_step")
    module.MODELS["tiny"] = (LAYERS, SHAPES)
    # The machine's caches are not what is tested.
    module._EVICTED_BYTES = 4096
    yield module
    del module.MODELS["tiny"]


@pytest.fixture(scope="module")
def report(bench_step, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "out" / "report.json"
    arguments = ["--model", "tiny", "--rank", str(RANK), "--rounds", str(ROUNDS), "--warmup", "1", "--device", "cpu"]
    assert bench_step.main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


# Rows of all factors of the tiny model: 3 x (24 + 16 + 16 + 40).
TALL_BYTES = 4 * RANK * 288
CORE_BYTES = 4 * RANK**2 * 6
# AdamW keeps one float32 step counter for each of the 12 factors.
STEP_BYTES = 4 * 12


def test_every_optimizer_is_there_and_runs_or_says_why(report):
    ran = {name for name, record in report["results"].items() if record["ran"]}
    assert ran == {
        "riemannion-offset",
        "riemannion-zero",
        "lora-tsd",
        "riemannlora",
        "riemannlora-plain",
        "per-layer",
        "scaled-adamw",
        "scaled-gd",
        "adamw",
        "peft-riemannian",
        "adamw-fused",
        "adamw-foreach",
        "muon",
    }
    assert set(report["results"]) - ran == {"riemannion-triton"}
    assert "need a CUDA device" in report["results"]["riemannion-triton"]["reason"]


def test_the_ratios_are_those_of_the_times(report):
    base = report["results"]["adamw-fused"]["times_ms"]
    assert len(base) == ROUNDS
    for record in (record for record in report["results"].values() if record["ran"]):
        times = record["times_ms"]
        assert record["median_ms"] == pytest.approx(statistics.median(times))
        assert record["p10_ms"] == pytest.approx(statistics.quantiles(times, n=10, method="inclusive")[0])
        assert record["p90_ms"] == pytest.approx(statistics.quantiles(times, n=10, method="inclusive")[-1])
        assert record["ratio_of_medians"] == pytest.approx(statistics.median(times) / statistics.median(base))
        by_round = [mine / other for mine, other in zip(times, base, strict=True)]
        assert record["median_of_ratios"] == pytest.approx(statistics.median(by_round))


def test_every_method_of_the_table_has_a_row_under_its_name(bench_step):
    methods = {"riemannion-offset" if name == "riemannion" else name for name in METHODS}
    assert methods <= bench_step.ENTRIES.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("riemannion-offset", TALL_BYTES + CORE_BYTES),
        ("riemannion-zero", TALL_BYTES + CORE_BYTES),
        ("lora-tsd", TALL_BYTES + CORE_BYTES),
        # Two averages of squared norms and a count for each of the 6 layers.
        ("riemannlora", TALL_BYTES + CORE_BYTES + 4 * 3 * 6),
        ("riemannlora-plain", TALL_BYTES + CORE_BYTES),
        # The core of the momentum is kept apart from its tall parts.
        ("per-layer", TALL_BYTES + 2 * CORE_BYTES),
        # Its step counters are numbers on the host.
        ("scaled-adamw", 2 * TALL_BYTES),
        ("scaled-gd", 0),
        ("peft-riemannian", 2 * TALL_BYTES + STEP_BYTES),
        ("adamw", 2 * TALL_BYTES + STEP_BYTES),
        ("adamw-fused", 2 * TALL_BYTES + STEP_BYTES),
        ("adamw-foreach", 2 * TALL_BYTES + STEP_BYTES),
        ("muon", TALL_BYTES),
    ],
)
def test_the_state_is_counted_to_the_byte(report, name, expected):
    record = report["results"][name]
    assert record["state_bytes"] == expected
    assert record["held_bytes"] >= expected


def test_adamws_traffic_is_its_floor(report):
    fused, foreach = (report["results"][name] for name in ("adamw-fused", "adamw-foreach"))
    assert fused["floor_bytes"] == foreach["floor_bytes"] == 7 * TALL_BYTES
    # One fused operation reads and writes everything once, and the step counters: two operations on 48 bytes.
    assert 0 <= fused["moved_bytes"] - 7 * TALL_BYTES <= 4 * STEP_BYTES
    assert foreach["moved_bytes"] > 2 * fused["moved_bytes"]


def test_the_floor_of_a_step_with_one_momentum_is_five_tall_blocks(report):
    assert report["results"]["muon"]["floor_bytes"] == 5 * TALL_BYTES
    assert report["results"]["riemannion-offset"]["floor_bytes"] == 5 * TALL_BYTES + 2 * CORE_BYTES


def test_the_report_names_the_machine_and_the_settings(report):
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["gpu"] is None
    assert report["settings"]["shapes"] == [list(shape) for shape in SHAPES] * LAYERS
    assert report["settings"]["adapters"] == 6


@pytest.mark.parametrize("rank", [1, RANK])
def test_gradients_are_blocks_of_one_dense_gradient(bench_step, rank):
    shapes, cpu = list(SHAPES), torch.device("cpu")
    gradients = bench_step.Gradients(shapes, rank, cpu, seed=0)
    for name in ("riemannion-offset", "muon"):
        contender = bench_step.ENTRIES[name].build(shapes, rank, cpu)
        gradients.leave(contender.pairs, turn=1)
        for (b, a), (p, q), d in zip(contender.pairs, gradients._tall, gradients._middle[1], strict=True):
            g = p @ d @ q.mT
            torch.testing.assert_close(b.grad, g @ a.data.mT)
            torch.testing.assert_close(a.grad, b.data.mT @ g)
            if rank > 1:
                assert a.grad.stride() == a.stride()


def test_the_loop_takes_the_same_steps_as_the_optimizer(bench_step):
    shapes, cpu = list(SHAPES), torch.device("cpu")
    gradients = bench_step.Gradients(shapes, RANK, cpu, seed=0)
    contenders = [bench_step.ENTRIES[name].build(shapes, RANK, cpu) for name in ("riemannion-offset", "per-layer")]
    for turn in range(5):
        for contender in contenders:
            gradients.leave(contender.pairs, turn)
            contender.optimizer.step()
    ours, loop = (
        [b.data @ s @ a.data for (b, a), s in zip(contender.pairs, contender.cores, strict=True)]
        for contender in contenders
    )
    for x, y in zip(ours, loop, strict=True):
        # Float32 in QR and SVD; the smallest singular values of the momentum are 1e-2 of its largest.
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


def test_scaled_adamw_computes_what_pefts_optimizer_over_adamw_does(bench_step):
    shapes, cpu = list(SHAPES) * LAYERS, torch.device("cpu")
    gradients = bench_step.Gradients(shapes, RANK, cpu, seed=0)
    contenders = [bench_step.ENTRIES[name].build(shapes, RANK, cpu) for name in ("scaled-adamw", "peft-riemannian")]
    # What the two do not share by default: PEFT's damping and the weight decay.
    for group in contenders[0].optimizer.param_groups:
        group["damping"], group["weight_decay"] = 1e-2, contenders[1].optimizer.defaults["weight_decay"]
    for turn in range(5):
        for contender in contenders:
            gradients.leave(contender.pairs, turn)
            contender.optimizer.step()
    for ours, theirs in zip(*(contender.factors() for contender in contenders), strict=True):
        # Entries of 1e-2 and more, moved by 1e-4 a step.
        torch.testing.assert_close(ours.data, theirs.data, rtol=0, atol=1e-7)


def test_a_row_that_fails_says_why_and_the_others_go_on(bench_step, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no room\nleft")

    refusing = dataclasses.replace(bench_step.ENTRIES["muon"], what="refuses", build=refuse)
    monkeypatch.setitem(bench_step.ENTRIES, "muon", refusing)
    results = bench_step.bench(
        list(SHAPES), RANK, ["muon", "adamw-fused"], rounds=1, warmup=0, device=torch.device("cpu")
    )
    assert results["muon"] == {"what": "refuses", "ran": False, "reason": "RuntimeError: no room left"}
    assert results["adamw-fused"]["ran"]


def test_a_local_config_gives_the_shapes_of_its_linear_layers(bench_step, tmp_path):
    LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=8,
    ).save_pretrained(tmp_path)
    layer = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    assert bench_step.adapter_shapes(str(tmp_path)) == layer * 5
    assert bench_step.adapter_shapes(str(tmp_path), layers=2) == layer * 2


def test_smollm2_has_210_adapters(bench_step):
    # The count that the README's figures are for; 4.88 million parameters at rank 16.
    shapes = bench_step.adapter_shapes("smollm2-135m")
    assert len(shapes) == 210
    assert 16 * sum(m + n for m, n in shapes) == 4_884_480


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "adam"], "--only must name some of"),
        (["--rank", "17"], "--rank must be at most 16"),
        (["--layers", "4"], "--layers must be at most 3"),
        (["--model", "/nowhere"], "--model must be one of"),
    ],
)
def test_what_a_user_can_mend_is_one_line(bench_step, capsys, arguments, said):
    defaults = [] if "--model" in arguments else ["--model", "tiny"]
    assert bench_step.main([*defaults, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_the_program_runs_as_its_docstring_says():
    options = "--layers 1 --rank 2 --rounds 1 --warmup 0 --threads 1 --device cpu --only riemannion-offset,adamw-fused"
    command = [sys.executable, str(RECIPE), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "riemannion-offset" in done.stdout
    assert "counted on CUDA only" in done.stdout
