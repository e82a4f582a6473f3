"""One run a folder: the second is told who holds it, and a holder that died is no holder."""

import json
import multiprocessing
import os
import signal

import pytest

from qriemann.errors import InputError
from qriemann.folder.lock import HOLDER, hold, refuse_if_held

spawn = multiprocessing.get_context("spawn")


def hold_until_killed(folder, ready, pid=None):
    """Holds the folder, with a forked worker if its number is asked for."""
    with hold(folder):
        if pid is not None:
            pid.value = os.fork() or signal.pause()
        ready.set()
        signal.pause()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_folder_in_use_is_refused_and_can_be_had_once_its_run_was_killed_though_a_worker_lives(tmp_path):
    out = tmp_path / "out"
    ready, worker = spawn.Event(), spawn.Value("i", 0)
    holder = spawn.Process(target=hold_until_killed, args=(out, ready, worker))
    holder.start()
    assert ready.wait(60)
    try:
        before = {path: path.read_bytes() for path in out.iterdir()}
        started_at = json.loads((out / HOLDER).read_text())["started_at"]
        for attempt in (lambda: refuse_if_held(out), lambda: hold(out).__enter__()):
            with pytest.raises(InputError, match=f"held by process {holder.pid} .*{started_at[:10]}"):
                attempt()
        assert {path: path.read_bytes() for path in out.iterdir()} == before
        holder.kill()
        holder.join()
        os.kill(worker.value, 0)
        refuse_if_held(out)
        with hold(out):
            assert json.loads((out / HOLDER).read_text())["pid"] == os.getpid()
        assert list(out.iterdir()) == []
    finally:
        holder.kill()
        os.kill(worker.value, signal.SIGKILL)


def test_a_folder_made_for_nothing_goes_again_and_one_with_something_stays(tmp_path):
    with hold(tmp_path / "runs" / "first"):
        pass
    assert not (tmp_path / "runs").exists()
    with hold(tmp_path / "runs" / "first"):
        (tmp_path / "runs" / "first" / "run.json").write_text("{}")
    assert [path.name for path in (tmp_path / "runs" / "first").iterdir()] == ["run.json"]


def test_a_folder_is_held_where_the_note_about_its_holder_cannot_be_written(tmp_path):
    (tmp_path / HOLDER).mkdir()
    with hold(tmp_path), pytest.raises(InputError, match=r"process \?"):
        refuse_if_held(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir must be a writable folder"), hold(tmp_path / "file" / "out"):
        pass
