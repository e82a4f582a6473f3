"""The Hub token is handed to the push and to nothing that is written."""

import pytest

from qriemann.release import push
from tests.recipe_fixtures import train_on

TOKEN = "hf_" + "Ab1" * 12


@pytest.mark.usefixtures("with_report")
def test_the_push_gets_the_token_and_no_file_of_the_run(tmp_path, settings, monkeypatch):
    pushed = []
    monkeypatch.setattr(push, "check_push", lambda *_: None)
    monkeypatch.setattr(push, "push", lambda *_, **given: pushed.append(given["token"]))
    pushing = {"max_steps": 2, "save_steps": 1, "eval_size": 0, "push": "me/tiny", "hub_token": TOKEN}
    train_on({**settings, **pushing})
    assert pushed == [TOKEN]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "run.json"} <= {path.name for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
