"""What a merge holds in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.release.conftest import save_adapter, save_chat_base

_SHARD_GB = 0.02

# Linux forgets the peak so far when 5 is written to clear_refs.
_MEASURE = """
import json, re, sys
from pathlib import Path
import qriemann.release.merge as merging
from qriemann.evaluation import proof

adapter, out, into, data, shard_gb = sys.argv[1:6]
load, at_load = proof.load_trained, []

def kib(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def load_and_measure(*arguments, **options):
    trained = load(*arguments, **options)
    Path("/proc/self/clear_refs").write_text("5")
    at_load.append(kib("VmRSS"))
    return trained

proof.load_trained = load_and_measure
# The 4-bit grid is a wreck for random weights of this depth, whatever the merge does.
result = merging.merge(adapter, out, into=into, data=data, shard_gb=float(shard_gb), max_kl=100.0)
assert result.accepted, result.verdicts
print(json.dumps([at_load[0] * 1024, kib("VmHWM") * 1024]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's own figure")
@pytest.mark.parametrize("into", ["original", "nf4-dequantized"])
def test_a_merge_adds_little_more_than_two_shards_to_the_loaded_4_bit_model(into, rows, tmp_path):
    """A bfloat16 model of 0.3 GB, written in files of 20 MB."""
    base = save_chat_base(
        tmp_path / "base",
        dtype=torch.bfloat16,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        shard="20MB",
    )
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    adapter = save_adapter(base, tmp_path / "adapter", r=8)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(adapter), str(tmp_path / "out"), into, str(few), str(_SHARD_GB)],
        # Large tensors are mappings of their own, so that what is freed is gone: the figure is what the merge holds, and
        # not what glibc keeps of what it held.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded, peak = json.loads(done.stdout.splitlines()[-1])
    # A shard being written, one mapped to be compared, the forward passes of the proof and the allocator's slack.
    bound = 2 * _SHARD_GB * 1e9 + 2**27
    assert peak - loaded < bound < 0.6 * size
