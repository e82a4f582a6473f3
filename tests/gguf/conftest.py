"""What llama.cpp computes with the files of a small model, held against transformers and PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qriemann.adapters.saved import SavedAdapter, read_adapter
from qriemann.evaluation import reload
from qriemann.evaluation.proof import Recording
from qriemann.gguf import compare
from qriemann.gguf.architectures import Layout
from qriemann.gguf.write import write_adapter
from tests.gguf.models import byte_tokenizer, random_model, write_whole
from tests.models import fill_lora, with_lora
from tests.release.conftest import save_adapter, save_chat_base


@pytest.fixture(scope="session", autouse=True)
def _llama_cpp_is_here() -> None:
    if not compare.has_engine():
        pytest.skip("needs llama.cpp; pip install 'qriemann[gguf]'")


@pytest.fixture(autouse=True)
def _upstream_is_quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        yield


@dataclass(frozen=True)
class Case:
    """A model, its adapter as PEFT saved it, and its logits on a row."""

    folder: Path
    model: Any
    adapter: SavedAdapter
    recording: Recording
    tokenizer: Any

    def write_base(self, **changes: Any) -> Path:
        """The base as a file; `tokenizer` may be another."""
        return write_whole(self.model, self.folder / "base.gguf", changes.get("tokenizer", self.tokenizer))

    def write_adapter(self, change: Callable[[str, Any], Any] = lambda name, layer: layer) -> Path:
        """The adapter as a file, each layer changed; one that becomes None is left out."""
        path = self.folder / "adapter.gguf"
        layers = {name: change(name, layer) for name, layer in self.adapter.layers.items()}
        changed = replace(self.adapter, layers={name: layer for name, layer in layers.items() if layer is not None})
        write_adapter(path, Layout(self.model), changed, name="tiny")
        return path

    def run(self, model: Path, adapter: Path | None, *, talk: bool = False) -> compare.Seen:
        return compare.run(model, adapter, self.recording, self.tokenizer, talk=talk)


@pytest.fixture
def make_case(tmp_path: Path) -> Callable[..., Case]:
    """A case of a type of model, with a random adapter on all of its linear layers."""

    def make(name: str, tokenizer: Any = None, **options: Any) -> Case:
        tokenizer = tokenizer or byte_tokenizer()
        model = random_model(name, rows=len(tokenizer) + 5)
        peft = with_lora(random_model(name, rows=len(tokenizer) + 5), **options).eval()
        fill_lora(peft, scale=0.05)
        peft.save_pretrained(tmp_path / "adapter")
        ids = torch.randint(0, 260, (40,), generator=torch.Generator().manual_seed(0)).tolist()
        positions = [0, 5, 20, 38]
        row = reload.ScoredRow(ids=ids, positions=positions, targets=[ids[place + 1] for place in positions])
        path = tmp_path / "recorded.safetensors"
        save_file({str(index): logits for index, logits in reload.logits_of_rows(peft, [row])}, path)
        untrained = reload.differences(model, [row], path)
        return Case(tmp_path, model, read_adapter(tmp_path / "adapter"), Recording(path, [row], untrained), tokenizer)

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_base(tmp_path_factory.mktemp("gguf") / "base", tokenizer=byte_tokenizer())


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A random adapter of that base."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        return save_adapter(base, tmp_path_factory.mktemp("gguf") / "adapter")
