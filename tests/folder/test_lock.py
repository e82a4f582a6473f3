"""One run a folder: the second is told who holds it, and a holder that died is no holder."""

import json
import multiprocessing
import os
import signal
from datetime import UTC, datetime

import pytest

from qriemann.errors import InputError
from qriemann.folder import lock
from qriemann.folder.lock import LOCK, hold, refuse_if_held

spawn = multiprocessing.get_context("spawn")


def hold_until_killed(folder, ready):
    with hold(folder):
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "out"."""
    ready = spawn.Event()
    process = spawn.Process(target=hold_until_killed, args=(tmp_path / "out", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_folder_in_use_is_refused_with_the_holders_pid_and_start_time(tmp_path, holder):
    started_at = json.loads((tmp_path / "out" / LOCK).read_text())["started_at"]
    for attempt in (lambda: refuse_if_held(tmp_path / "out"), lambda: hold(tmp_path / "out").__enter__()):
        with pytest.raises(InputError, match=f"held by process {holder.pid} .*{started_at[:10]}"):
            attempt()
    assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == holder.pid


@pytest.mark.parametrize("with_flock", [True, False])
def test_the_folder_of_a_killed_run_can_be_had(tmp_path, holder, with_flock, monkeypatch):
    if not with_flock:
        monkeypatch.setattr(lock, "fcntl", None)
        with pytest.raises(InputError, match=f"process {holder.pid}"):
            refuse_if_held(tmp_path / "out")
    holder.kill()
    holder.join()
    refuse_if_held(tmp_path / "out")
    with hold(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "out" / LOCK).exists()


def hold_and_fork(folder, ready, pid):
    with hold(folder):
        worker = os.fork()
        if worker == 0:
            signal.pause()
        pid.value = worker
        ready.set()
        signal.pause()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_the_folder_of_a_killed_run_can_be_had_while_its_workers_live(tmp_path):
    ready, pid = spawn.Event(), spawn.Value("i", 0)
    process = spawn.Process(target=hold_and_fork, args=(tmp_path / "out", ready, pid))
    process.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match=f"process {process.pid}"):
        refuse_if_held(tmp_path / "out")
    process.kill()
    process.join()
    try:
        os.kill(pid.value, 0)
        refuse_if_held(tmp_path / "out")
    finally:
        os.kill(pid.value, signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", None)])
def test_a_lock_that_is_no_file_is_one_line(tmp_path, make):
    make(tmp_path / LOCK)
    for attempt in (lambda: refuse_if_held(tmp_path), lambda: hold(tmp_path).__enter__()):
        with pytest.raises(InputError, match=f"{LOCK} must be a file"):
            attempt()


def test_without_flock_a_number_that_another_process_inherited_is_no_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    long_ago = datetime(2001, 1, 1, tzinfo=UTC).isoformat()
    (tmp_path / LOCK).write_text(json.dumps({"pid": os.getpid(), "started_at": long_ago}))
    refuse_if_held(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({"pid": os.getpid(), "started_at": datetime.now(UTC).isoformat()}))
    with pytest.raises(InputError, match=str(os.getpid())):
        refuse_if_held(tmp_path)


def test_a_folder_made_for_nothing_goes_again_and_one_with_something_stays(tmp_path):
    with hold(tmp_path / "runs" / "first"):
        pass
    assert not (tmp_path / "runs").exists()
    with hold(tmp_path / "runs" / "first"):
        (tmp_path / "runs" / "first" / "run.json").write_text("{}")
    assert [path.name for path in (tmp_path / "runs" / "first").iterdir()] == ["run.json"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir must be a writable folder"), hold(tmp_path / "file" / "out"):
        pass
