"""A base of the same name and shape but other weights is noticed by everything that puts a trained adapter on it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import qriemann
from qriemann.chat.session import load_session
from qriemann.checkpoints.fingerprints import base_fingerprint
from qriemann.evaluation.evaluate import evaluate
from qriemann.release.export import export
from qriemann.release.merge import merge
from tests.models import with_lora
from tests.recipe_fixtures import chat_rows, train_in
from tests.release.conftest import save_chat_base

WARNING = "trained on another revision of"
CHANGED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a run of one step on it in 4 bit."""
    folder = tmp_path_factory.mktemp("revision")
    base = save_chat_base(folder / "base")
    train_in(folder, base, chat_rows(8), max_steps=1, eval_size=0, save_strategy="no")
    return base, folder / "run"


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run, whose base is another one now: a single weight of one layer differs."""
    base, run = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in trained)
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        if CHANGED in tensors:
            tensors[CHANGED][5, 7] += 1.0
            save_file(tensors, path, metadata={"format": "pt"})
    path = run / "adapter_config.json"
    path.write_text(path.read_text().replace(str(trained[0]), str(base)))
    return run


COMMANDS: dict[str, Callable[[Path, Path, Path, Console], Any]] = {
    "merge": lambda run, out, rows, console: merge(run, out, data=str(rows), console=console),
    "export": lambda run, out, rows, console: export(run, out, rank=1, data=str(rows), max_kl=100.0, console=console),
    "eval": lambda run, out, rows, console: evaluate(run, str(rows), max_rows=2, console=console),
}


def warnings_of(command: str, folder: Path, out: Path, rows: Path) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    COMMANDS[command](folder, out, rows, console)
    return [line for line in console.file.getvalue().splitlines() if "warning" in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_another_revision_is_one_line_with_both_fingerprints(command, run, rows, tmp_path):
    (line,) = warnings_of(command, run, tmp_path / "out", rows)
    recorded = json.loads((run / "run.json").read_text())["model"]["fingerprint"]
    found = base_fingerprint(qriemann.load_base(run.parent / "base")[0])
    assert recorded != found
    assert WARNING in line
    assert recorded[:12] in line
    assert found[:12] in line


def test_the_base_that_was_trained_on_and_an_adapter_of_another_tool_give_no_warning(trained, adapter, rows, tmp_path):
    for folder in (trained[1], adapter):
        assert warnings_of("eval", folder, tmp_path / "out", rows) == []


def test_a_chat_begins_with_the_same_line(trained, run):
    assert [note for note in load_session(trained[1]).notes if "computing on" not in note] == []
    note, where = load_session(run).notes
    assert where.startswith("computing on the CPU")
    assert WARNING in note
    # A base in floats does not compare with one in 4 bit; that it is another one is said.
    note, _ = load_session(run, quantize="none").notes
    assert "trained on the base in 4 bit, and is read on it unquantized" in note


def test_an_adapter_changes_nothing_of_the_fingerprint_of_its_base(base):
    model, _ = qriemann.load_base(base)
    before = base_fingerprint(model)
    assert base_fingerprint(with_lora(model, modules_to_save=["lm_head"])) == before


def test_the_precision_of_a_base_stored_in_bfloat16_does_not_change_its_fingerprint(tmp_path):
    folder = save_chat_base(tmp_path / "base", dtype=torch.bfloat16)
    prints = {base_fingerprint(qriemann.load_base(folder, dtype=dtype)[0]) for dtype in ("float32", "bfloat16")}
    assert len(prints) == 1
