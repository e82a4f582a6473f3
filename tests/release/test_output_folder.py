"""Whoever may enter an output folder may read what is in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qriemann.release.atomic_folder import move_into_place, written_or_nothing


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_weights_have_the_mode_that_other_files_have(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        with written_or_nothing(tmp_path / "out.partial"):
            save_file({"a": torch.ones(2)}, tmp_path / "out.partial" / "model.safetensors")
            move_into_place(tmp_path / "out.partial", tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == mode
