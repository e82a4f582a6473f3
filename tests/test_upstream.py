"""Upstream's bars and warnings stay out of a log, and come back afterwards."""

from __future__ import annotations

import io
import logging
import sys
import warnings

import datasets
import pytest
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as hf_logging

from qriemann.errors import InputError
from qriemann.reporting import reporting
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


NOTICES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: no connection",
    "transformers.modeling_utils": "LlamaForCausalLM LOAD REPORT from: base",
    "transformers.trainer_utils": "Warning: The following arguments do not match the ones in the `trainer_state.json`",
    "huggingface_hub.repocard": "Repo card metadata block was not found. Setting CardData to empty.",
}


@pytest.mark.parametrize("name", NOTICES)
def test_a_line_that_says_nothing_stays_hidden_and_others_of_its_logger_do_not(name):
    seen: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    logger, handler = logging.getLogger(name), Collect()
    logger.addHandler(handler)
    try:
        with quiet():
            logger.warning(NOTICES[name])
            logger.warning("your disk is full")
        # A library may be imported only at the end of a program.
        logger.warning(NOTICES[name])
    finally:
        logger.removeHandler(handler)
    assert seen == ["your disk is full"]
    filters = len(logger.filters)
    with quiet(), quiet():
        assert len(logger.filters) == filters


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_console_that_cannot_show_a_character_shows_a_question_mark(monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def run() -> int:
        table = Table("what")
        table.add_row("caf\u00e9 \u2581")
        Console().print(table)
        raise InputError("no file \u5b57.yaml")

    assert reporting(run) == 2
    for stream in streams:
        stream.flush()
    shown, error = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert "?" in shown
    assert "caf" in shown
    assert error == "qriemann: no file ?.yaml\n"
