"""One process in which `import qriemann` raises, shared by all tests that ask what others make of our files.

It starts when it is first needed: importing torch and PEFT costs it 9 s.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_SERVER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qriemann":
            raise ImportError("qriemann is not installed in this process")

sys.meta_path.insert(0, Refuse())
try:
    import qriemann
except ImportError:
    pass
else:
    raise SystemExit("qriemann could be imported")

import json
import traceback
import torch

torch.set_num_threads(1)
# Whatever the libraries print is no answer.
answers, sys.stdout = sys.stdout, sys.stderr
for request in sys.stdin:
    source, values, out = json.loads(request)
    error = None
    try:
        exec(source, values)
        torch.save(values["result"], out)
    except Exception:
        error = traceback.format_exc()
    print(json.dumps(error), file=answers, flush=True)
"""

# Names for the source of `run_elsewhere`.
LOAD_BASE = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

def load_base(folder, nf4):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization if nf4 else None
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=tempfile.gettempdir(),
    )
    # It ends when there is nothing more to read.
    atexit.register(server.communicate)
    return server


def run_elsewhere(source: str, **values: Any) -> Any:
    """What `source` leaves in `result`, run after `LOAD_BASE` with these JSON values as its names."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        server.stdin.write(json.dumps([LOAD_BASE + source, values, str(out)]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer == "null\n", json.loads(answer or '"the process ended"')
        return torch.load(out)
