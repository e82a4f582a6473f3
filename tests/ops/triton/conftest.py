"""Where the kernels run: with `-m gpu` on the CUDA device, else in Triton's interpreter on the CPU.

The interpreter has to be chosen before Triton is imported, for the whole process. So these tests are no part of `pytest`
alone, and without a GPU they refuse to run beside others, whose optimizers would be interpreted too.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

_HERE = Path(__file__).parent.resolve()


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available():
        return
    paths = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if not all(_HERE in (path, *path.parents) for path in paths):
        raise pytest.UsageError("interpreted kernels need a process of their own: pytest tests/ops/triton")
    os.environ["TRITON_INTERPRET"] = "1"
    _speed_up_the_interpreter()


# Before `-m gpu` chooses by the markers.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # NumPy, which interprets the kernels, says so of NaN that the tests put in.
        item.add_marker(pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"))
        # So does torch, which is asked for deterministic algorithms for the sake of that NaN.
        item.add_marker(pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"))
        if torch.cuda.is_available():
            # On a card every test of the kernels is one of the card.
            item.add_marker(pytest.mark.gpu)


def _speed_up_the_interpreter() -> None:
    """Five times faster; changes no result.

    It patches triton.language anew at every call of a device function, once a launch is enough; and it repeats each
    integer operation in 64 bits to find overflows.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def call_device_function(self, *args, **kwargs):
        key = id(self.fn.__globals__)
        if key not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(key)
        return self.rewrite()(*args, **kwargs)

    def call_kernel(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_device_function
    interpreter.GridExecutor.__call__ = call_kernel
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """torch.empty gives NaN, so a place that a kernel forgets to write fails the test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    # Likewise.
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)
