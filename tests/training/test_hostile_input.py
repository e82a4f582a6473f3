"""Files from strangers and from crashes: whatever is in them, what comes out is the run that was meant or one line."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qriemann.errors import InputError
from qriemann.training.checkpoints import MANIFEST, find_content_defect, find_defect, newest_checkpoint
from qriemann.training.config import _FIELDS, load_config
from qriemann.training.data import prepare
from qriemann.training.sources import load_sources
from tests.training.conftest import make_tokenizer
from tests.training.runs import protected_trainer

# Seconds of work that one reading may take; nothing here is longer than a few kB.
_PATIENCE = 5.0
_SLOW = pytest.mark.slow
# Upstream's own line about a key that it will drop: it names the key.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
_FEW = 60

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(sorted(_FIELDS)) | st.text(max_size=12)
turns = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), values, max_size=3)
rows = st.dictionaries(
    st.sampled_from(["messages", "prompt", "completion", "text", "instruction", "output", "conversations", "other"]),
    st.lists(turns | values, max_size=3) | values,
    max_size=3,
)


@contextmanager
def only_our_error():
    """Lets InputError pass, and fails for a reading that takes long."""
    began = time.process_time()
    with suppress(InputError):
        yield
    assert time.process_time() - began < _PATIENCE


def at_length(property_test: Callable, strategies: dict) -> tuple[Callable, Callable]:
    """The property on a few cases for every run, and on 10,000 for a slow one."""

    def made(cases: int) -> Callable:
        quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
        # The few are the same in every run, so that a change is blamed for what it did; the many search.
        few = cases == _FEW
        return settings(max_examples=cases, derandomize=few, **quiet)(given(**strategies)(property_test))

    return made(_FEW), _SLOW(made(10_000))


def read_yaml_settings(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    environment = dict(os.environ)
    try:
        with only_our_error():
            load_config(path)
    finally:
        os.environ.clear()
        os.environ.update(environment)


yaml_contents = st.binary(max_size=200) | st.dictionaries(keys, values, max_size=4)
test_any_yaml_is_a_configuration_or_one_line, test_10_000_yamls = at_length(
    read_yaml_settings,
    {"content": yaml_contents.map(lambda c: {"output_dir": "out", **c} if isinstance(c, dict) else c)},
)


def test_a_yaml_cannot_construct_objects(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(InputError, match="valid YAML"):
        load_config(path)
    assert not (tmp_path / "made").exists()


def read_dataset(tmp_path, content, suffix):
    path = tmp_path / f"rows{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    with only_our_error():
        train, held_out = load_sources(str(path))
        prepare(train, held_out, make_tokenizer(), max_length=64)


dataset_contents = {
    "content": st.lists(rows, max_size=3) | st.binary(max_size=100),
    "suffix": st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]),
}
test_any_dataset_file_is_rows_or_one_line, test_10_000_dataset_files = at_length(read_dataset, dataset_contents)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer, _ = protected_trainer(folder, max_steps=1)
    trainer.train()
    return folder / "checkpoint-1"


def read_damaged_checkpoint(tmp_path, checkpoint, name, place, change):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    damaged = Path(shutil.copytree(checkpoint, run / checkpoint.name))
    path = damaged / name
    content = path.read_bytes()
    at = int(place * len(content))
    path.write_bytes(content[:at] + change + content[at + len(change) :])
    intact = path.read_bytes() == content
    began = time.process_time()
    found = newest_checkpoint(run)
    # A manifest of the same meaning may be other bytes: spaces, say.
    assert (found.path is not None) == intact or name == MANIFEST
    # What a stranger's manifest would vouch for.
    assert "\n" not in (find_content_defect(damaged) or "")
    assert time.process_time() - began < _PATIENCE


damage = {
    "name": st.sampled_from(
        ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST]
    ),
    "place": st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.0001, 0.001]),
    "change": st.binary(min_size=1, max_size=64),
}
test_any_damage_to_a_checkpoint_is_found, test_10_000_damaged_checkpoints = at_length(read_damaged_checkpoint, damage)


def read_manifest_of_anyone(tmp_path, checkpoint, content):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    (tmp_path / "outside").write_text("")
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "checkpoint-1" / MANIFEST).write_text(json.dumps(content))
    assert find_defect(run / "checkpoint-1") is not None
    assert newest_checkpoint(run).path is None


manifests = st.fixed_dictionaries(
    {
        "format": st.just(1) | scalars,
        "serial": st.just(1) | values,
        "run": st.just({}) | values,
        "files": st.dictionaries(
            st.sampled_from(["../outside", "/etc/passwd", "optimizer.pt", "\x00", "a" * 300, "."])
            | st.text(max_size=9),
            st.fixed_dictionaries({"bytes": st.just(0) | values, "sha256": values}) | values,
            max_size=3,
        )
        | values,
    }
)
test_no_manifest_of_anyone_makes_a_checkpoint, test_10_000_manifests = at_length(
    read_manifest_of_anyone, {"content": manifests}
)
