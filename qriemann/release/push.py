"""`push`: uploads an adapter or a merged model to the Hub in one commit, with huggingface_hub's own client.

A failed push leaves the repository as it was, and the same command continues without sending large files again. Only files
that a model needs go up; optimizer states, checkpoints and `training_args.bin` (a pickle with local paths) stay.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from httpx2 import HTTPError, TransportError
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from safetensors import safe_open

from qriemann.errors import InputError, causes
from qriemann.folder.contents import CURVE, GGUF_REPORT, PROOF, ModelFolder, is_hub_id, read_folder
from qriemann.folder.private import find_private, hide_credentials, without_paths
from qriemann.folder.records import TRAINED_ON, recorded_base
from qriemann.release.card import CARD, make_card, write_card
from qriemann.upstream import quiet

# Their strings are a vocabulary, and rewriting one would change the model.
_VOCABULARY = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_SHARED = [
    *_VOCABULARY,
    "tokenizer_config.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    CURVE,
    "inspect.png",
    "metrics.jsonl",
    PROOF,
]
_GGUF = ["*.gguf", "Modelfile", "chat_template.jinja", GGUF_REPORT]
_FILES = {
    "gguf": _GGUF,
    "adapter": ["adapter_config.json", "adapter_model.safetensors", TRAINED_ON, *_SHARED],
    "model": ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", *_SHARED],
}
_BINARY = (".png", ".model", ".gguf")
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Upload:
    """One file that goes up."""

    name: str
    content: Path | bytes
    note: str = ""

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class PushResult:
    """What a push did, or with `dry_run` would do.

    Attributes:
        url: of the commit; None of a dry run.
        kept: names in the folder that stay on this machine.
    """

    repo: str
    url: str | None
    uploads: list[Upload]
    kept: list[str]


def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    dry_run: bool = False,
    base_id: str | None = None,
    run: str | os.PathLike[str] | None = None,
    token: str | None = None,
    console: Console | None = None,
) -> PushResult:
    """Uploads an adapter or a merged model with its card.

    Args:
        folder: of the adapter or of the merged model; its README.md is written or brought up to date.
        repo: OWNER/NAME on the Hub; made if it does not exist.
        private: True refuses to upload into a repository that others can read; None leaves that as it is.
        dry_run: only says what would go up; writes and sends nothing.
        base_id: Hub id of the base model, needed where the adapter names something on this machine.
        run: folder of the training, for the card of a merged model.
        token: of the Hub; None takes the one of this machine (`hf auth login`, or HF_TOKEN).
        console: for the list of files and the address.

    Raises:
        InputError: a credential or a local path in a file, a base that only this machine has, no rights, no network. The
            repository is as it was, and the same call continues.
    """
    console = console or Console(quiet=True)
    found = read_folder(folder, run=run)
    base = _check(found, repo, base_id)
    token = token or get_token()
    api = HfApi(token=token)
    card = make_card(found, repo=repo, base_id=base, license={} if dry_run or base is None else _license(api, base))
    uploads = _uploads(found, card, base)
    # A folder in which a file goes up does not stay.
    names = {upload.name.partition("/")[0] for upload in uploads}
    kept = sorted(path.name + "/" * path.is_dir() for path in found.path.iterdir() if path.name not in names)
    table = Table("file", "size", "", title=f"{'would go' if dry_run else 'going'} to {repo}", title_justify="left")
    for upload in uploads:
        table.add_row(upload.name, decimal(upload.size), upload.note)
    console.print(table)
    if kept:
        console.print(f"stays here: {', '.join(kept)}", highlight=False, markup=False)
    if dry_run:
        return PushResult(repo, None, uploads, kept)
    if not token:
        raise InputError("no token of the Hub is known; run hf auth login, or set HF_TOKEN")
    # Before anything is sent: a push that breaks off leaves the card.
    write_card(found, card)
    with _one_line(found.path, repo, token), quiet():
        full_name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        # The Hub ignores the wish where the repository exists already.
        if private and not api.repo_info(full_name).private:
            raise InputError(f"{full_name} can be read by others; make it private there, or name another")
        operations = [CommitOperationAdd(upload.name, upload.content) for upload in uploads]
        commit = api.create_commit(full_name, operations, commit_message=f"Upload {found.kind} with qriemann")
    console.print(f"done: {commit.commit_url}", highlight=False, markup=False, soft_wrap=True)
    return PushResult(full_name, commit.commit_url, uploads, kept)


def check_push(repo: str, base: str, base_id: str | None) -> None:
    """Raises InputError, before a training, for what would stop its push afterwards without a look at the network."""
    _check_repo(repo)
    if base_id is None and not is_hub_id(base):
        raise InputError(_local_base(base, "hub_base_id"))


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"the repository must be OWNER/NAME on the Hub, got {repo!r}; correct it") from error


def _check(found: ModelFolder, repo: str, base_id: str | None) -> str | None:
    """The Hub id of the base, after everything that can be known without the network has been checked."""
    _check_repo(repo)
    if base_id is not None and not is_hub_id(base_id):
        raise InputError(f"base-id must be OWNER/NAME of a model on the Hub, got {base_id!r}; correct it")
    if found.kind == "run":
        raise InputError(f"{found.path} holds neither an adapter nor a merged model; finish the run")
    weights = {"adapter": "adapter_model.safetensors", "gguf": "*.gguf"}.get(found.kind, "model*.safetensors")
    if not any(found.path.glob(weights)):
        raise InputError(f"{found.path} holds no {weights}; pickled and rejected weights are not pushed")
    if base_id is not None or found.base is None or is_hub_id(found.base):
        return base_id or found.base
    # A merged model loads without its base: only its card names it.
    if found.kind != "adapter":
        return None
    raise InputError(_local_base(found.base, "--base-id"))


def _local_base(base: str, option: str) -> str:
    return f"nobody else has the base {base!r}; name the model on the Hub that it is, OWNER/NAME, with {option}"


def _license(api: HfApi, base: str) -> dict[str, str]:
    """The base's licence as its card names it; empty if that cannot be known from here."""
    try:
        card = api.model_info(base).card_data
    # A licence that is not found must not stop a push; what else is wrong will.
    except (HTTPError, OfflineModeIsEnabled):
        return {}
    return {} if card is None else {key: str(card[key]) for key in _LICENSE_KEYS if card.get(key)}


def _uploads(found: ModelFolder, card: str, base: str | None) -> list[Upload]:
    names = {found.base: base} if found.base and base else {}
    inside = sorted([*found.path.iterdir(), *found.path.glob("additional_chat_templates/*")])
    files = {path.relative_to(found.path).as_posix(): path for path in inside if path.is_file()}
    uploads = [Upload(CARD, card.encode(), "the card")]
    uploads += [
        _upload(name, files[name], names) for name in filter_repo_objects(files, allow_patterns=_FILES[found.kind])
    ]
    # Without it, the adapter would be read on a 4-bit base after a download.
    if found.kind == "adapter" and TRAINED_ON not in files and (recorded := recorded_base(found.path)):
        uploads.append(Upload(TRAINED_ON, (json.dumps(recorded, indent=2) + "\n").encode(), "how the base was loaded"))
    for place, _ in found.exports:
        if place != found.path:
            inner = {path.name: path for path in sorted(place.iterdir()) if path.is_file()}
            for name in filter_repo_objects(inner, allow_patterns=_GGUF):
                uploads.append(_upload(f"{place.name}/{name}", inner[name], names))
    if found.curve is not None and found.curve.parent != found.path:
        uploads.append(Upload(CURVE, found.curve))
    base_path = Path(found.base or "").expanduser()
    places = [found.path, *([base_path] if base_path.is_absolute() else [])]
    for upload in uploads:
        for line, what in find_private(_text(upload), paths=places):
            raise InputError(
                f"{upload.name}, line {line}, holds {what}, which must not go up; remove it (and revoke a credential)"
            )
    return uploads


def _upload(name: str, path: Path, names: dict[str, str]) -> Upload:
    """The file, local paths in it replaced where it is JSON whose strings are names."""
    if path.suffix != ".json" or path.name in _VOCABULARY:
        return Upload(name, path)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; save the model again") from error
    after = without_paths(before, names)
    if after == before:
        return Upload(name, path)
    written = json.dumps(after, indent=2, ensure_ascii=False) + "\n"
    return Upload(name, written.encode(), "local names replaced")


def _text(upload: Upload) -> str:
    """What of a file can hold words: all of a text file, the metadata of a safetensors file."""
    if isinstance(upload.content, bytes):
        return upload.content.decode()
    if upload.content.suffix == ".safetensors":
        with safe_open(upload.content, "np") as file:
            return json.dumps(file.metadata(), indent=0)
    return "" if upload.content.suffix in _BINARY else upload.content.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _one_line(folder: Path, repo: str, token: str) -> Iterator[None]:
    """Turns what goes wrong between here and the Hub into one line without the token."""
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        message = hide_credentials(_explain(error, repo).replace(token, "<redacted>"))
        # Without its cause: a request's text may hold the token, and a traceback shows it.
        raise InputError(f"{message}; the card is in {folder}; run the same command again to continue") from None


def _explain(error: BaseException, repo: str) -> str:
    # The client wraps what went wrong while it sent large files.
    chain = causes(error)
    answers = [cause.response.status_code for cause in chain if isinstance(cause, HfHubHTTPError)]
    status = answers[0] if answers else None
    if status == 401:
        return f"the Hub does not know the token (401, for {repo}); run hf auth login"
    if status in (403, 404):
        return f"the token has no right to write to {repo} ({status}); take a write token, or a name of your own"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return "the Hub cannot be reached in offline mode; unset HF_HUB_OFFLINE"
    if any(isinstance(cause, TransportError | ConnectionError) for cause in chain):
        return f"the Hub cannot be reached at {constants.ENDPOINT} ({type(chain[-1]).__name__}); check the network"
    # The outermost says what was being done, the innermost what went wrong.
    lines = dict.fromkeys(line.strip() for one in (error, chain[-1]) for line in str(one).splitlines() if line.strip())
    return f"the Hub does not take {repo}: {' '.join(list(lines)[:3]) or type(error).__name__}"
