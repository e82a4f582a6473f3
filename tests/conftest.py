"""Shared by all tests: the number of processes and threads, a tiny chat model, and the settings of a run on it."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest

# The tensors of most tests are tiny: with more threads they wait for each other longer than they compute. Set before torch
# is imported, and inherited by the processes that tests start. Importing torch here would cost the controller seconds.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Hides every GPU but from `-m gpu`: what the other tests say holds for the CPU, whatever the machine has."""
    if _wants_gpu(config):
        # Without it cuBLAS warns wherever a test asks for deterministic algorithms, and warnings are errors.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collects the kernels' tests with `-m gpu`: compiled, they need no process of their own."""
    if not _wants_gpu(config) or collection_path != Path(__file__).parent / "ops" / "triton":
        return None
    import torch

    return False if torch.cuda.is_available() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu, which shows it"))


def _wants_gpu(config: pytest.Config) -> bool:
    return re.search(r"(?<!not )\bgpu\b", config.option.markexpr or "") is not None


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two to four processes for whole folders; none for named files, where importing torch again costs more than it saves."""
    named = any(".py" in argument for argument in config.args)
    # One process on the card: each would hold a CUDA context of its own.
    return 0 if named or _wants_gpu(config) else min(4, os.cpu_count() or 1)


@pytest.fixture(scope="session", autouse=True)
def _imported_objects_are_frozen() -> Iterator[None]:
    """Each full collection that a trainer asks for takes 0.3 s over the objects of the libraries, which none frees."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _templates_are_compiled_once() -> Iterator[None]:
    """PEFT writes its model card from a template with every save, and compiles it for 0.07 s each time."""
    compile_template = jinja2.Environment.compile
    jinja2.Environment.compile = functools.cache(compile_template)
    yield
    jinja2.Environment.compile = compile_template


@pytest.fixture
def with_report() -> None:
    """Asked for by a test whose runs write card and report."""


@pytest.fixture(autouse=True)
def _no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report at the end of a run is two seconds of drawing, twice what the rest of a tiny run takes."""
    train = sys.modules.get("qriemann.training.train")
    if train is not None and "with_report" not in request.fixturenames:
        monkeypatch.setattr(train, "publish", lambda *_, **__: None)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tests.recipe_fixtures import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A local model folder: hidden size 32, two layers."""
    from tests.recipe_fixtures import save_model

    return save_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines and returns the file."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def settings(tmp_path: Path, model_folder: Path, write_rows: Callable[..., Path]) -> dict[str, Any]:
    """A recipe of that model on 24 rows; files extend it by a fixture of the same name."""
    from tests.recipe_fixtures import chat_rows

    return {
        "model_name_or_path": str(model_folder),
        "quantize": "none",
        "dataset_name": str(write_rows(chat_rows(24))),
        "output_dir": str(tmp_path / "out"),
        "lora_r": 4,
        "display": "none",
    }
