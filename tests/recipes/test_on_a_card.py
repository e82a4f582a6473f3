"""`measure on_a_card`: all of it at small sizes on the CPU, and what is kept of a part whose time is up."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = Path(__file__).parents[2] / "recipes" / "measure"
sys.path.insert(0, str(MEASURE))


@pytest.fixture
def on_a_card():
    return importlib.import_module("on_a_card")


@pytest.mark.soak
def test_the_rehearsal_on_the_cpu_finds_every_fact_right(on_a_card, tmp_path):
    path = tmp_path / "out" / "card.json"
    command = [sys.executable, str(MEASURE), "on_a_card", "--device", "cpu", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = json.loads(path.read_text())["parts"]
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert list(parts) == list(on_a_card.PARTS)
    facts = {name: fact for part in parts.values() for name, fact in part["facts"].items()}
    assert not [name for name, fact in facts.items() if fact["right"] is False]
    # Independent of the bounds in the script: what must be exact on one machine is.
    for kind in ("nf4", "none"):
        assert facts[f"resumed, {kind}: largest difference of a factor"]["value"] == 0
    assert facts["auto_batch, cut short before the second step"]["value"]["fallbacks"] == 1
    assert facts["float32: worst tangent block against float64"]["value"] < 1e-5


def test_a_part_whose_time_is_up_is_killed_and_the_call_fails(on_a_card, tmp_path, capsys):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"parts": {"numbers": {"facts": {"kept": {"right": True}}, "ended": "finished"}}}))
    # Shorter than torch's import.
    on_a_card._start("basics", path, "cpu", 1.2)
    parts = json.loads(path.read_text())["parts"]
    assert parts["basics"]["ended"] == "out of time after 1 s"
    assert parts["numbers"]["facts"] == {"kept": {"right": True}}
    assert on_a_card._conclude(path, ["numbers"]) == 0
    assert on_a_card._conclude(path, ["numbers", "basics"]) == 1
    assert "basics: out of time" in capsys.readouterr().out
