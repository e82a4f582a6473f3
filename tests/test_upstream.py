"""Upstream's bars and warnings stay out of a log, and come back afterwards."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings

import datasets
import pytest
from transformers.utils import logging as hf_logging

from qriemann.upstream import quiet


def test_bars_of_every_library_are_hidden_within_the_block_alone():
    def drawn() -> list[bool]:
        kinds = (datasets.utils.tqdm, hf_logging.tqdm)
        return [bool(_draw(kind)) for kind in kinds]

    with quiet(bars=False):
        assert drawn() == [False, False]
    with quiet(bars=True):
        assert drawn() == [True, True]
    assert drawn() == [True, True]


def _draw(bar) -> str:
    written = io.StringIO()
    list(bar(range(2), file=written, disable=False))
    return written.getvalue()


def test_only_the_warnings_that_nobody_can_act_on_are_hidden():
    with quiet(), pytest.warns(UserWarning, match="act on this"):
        warnings.warn("act on this", UserWarning, stacklevel=1)
    with quiet():
        warnings.warn("Careful, disabling adapter layers with bias", UserWarning, stacklevel=1)


def test_importing_it_imports_none_of_the_libraries():
    heavy = ("torch", "transformers", "datasets", "peft", "trl", "bitsandbytes")
    code = f"import sys, qriemann.upstream; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
