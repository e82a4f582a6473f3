"""`push`: an adapter or a merged model to the Hub, by huggingface_hub's own client, in one commit.

One commit is what makes a failed push harmless: whatever breaks off before it leaves the repository as it was, large files
that arrived are known to the Hub by their hash and are not sent again, and the same command goes on. What goes up is a list
of files that a model needs; optimizer states, checkpoints and `training_args.bin` (a pickle with local paths) stay.
"""

from __future__ import annotations

import fnmatch
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from rich.console import Console
from rich.table import Table

from qriemann.errors import InputError
from qriemann.folder.contents import CURVE, PROOF, ModelFolder, is_hub_id, read_folder
from qriemann.folder.private import find_private, hide_credentials, without_paths
from qriemann.release.card import CARD, make_card, write_card

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "chat_template.json",
)
_RECORDS = (CURVE, "inspect.png", "metrics.jsonl", PROOF)
_FILES = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors", *_TOKENIZER, *_RECORDS),
    "model": (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
        *_TOKENIZER,
        *_RECORDS,
    ),
}
# Their strings are a vocabulary, and rewriting one would change the model.
_VOCABULARY = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_BINARY = (".safetensors", ".png", ".model")
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Upload:
    """One file that goes up.

    Attributes:
        content: the file as it lies on disk, or what is sent in its place.
        note: what was changed on the way, for people.
    """

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
        repo: OWNER/NAME.
        url: of the commit; None of a dry run.
        uploads: the files, the card among them.
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
            repository is as it was, and the same call goes on.
    """
    console = console or Console(quiet=True)
    found = read_folder(folder, run=run)
    _check_arguments(found, repo, base_id)
    base = _base_id(found, base_id)
    token = token or get_token()
    api = HfApi(token=token)
    license = {} if dry_run else _license(api, base)
    card = make_card(found, repo=repo, base_id=base, license=license)
    uploads = _uploads(found, card, base)
    names = {upload.name for upload in uploads}
    kept = sorted(path.name + "/" * path.is_dir() for path in found.path.iterdir() if path.name not in names)
    console.print(_table(uploads, f"{'would go' if dry_run else 'going'} to {repo}"))
    if kept:
        console.print(f"stays here: {', '.join(kept)}", highlight=False, markup=False)
    if dry_run:
        return PushResult(repo, None, uploads, kept)
    if not token:
        raise InputError("a token must be there to push, got none; hf auth login, or set HF_TOKEN")
    # Before anything is sent: a push that breaks off leaves the card.
    write_card(found, card)
    with _one_line(found.path, repo, token), _bars(shown=console.is_terminal):
        full_name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        # The Hub ignores the wish where the repository exists already.
        if private and not api.repo_info(full_name).private:
            raise InputError(
                f"{full_name} must be private, got one that others can read; change it there, or name another"
            )
        operations = [CommitOperationAdd(upload.name, upload.content) for upload in uploads]
        commit = api.create_commit(full_name, operations, commit_message=f"Upload {found.kind} with qriemann")
    console.print(f"done: {commit.commit_url}", highlight=False, markup=False, soft_wrap=True)
    return PushResult(full_name, commit.commit_url, uploads, kept)


def check_push(repo: str, base: str, base_id: str | None) -> None:
    """Raises InputError, before a training, for what would stop its push afterwards without a look at the network."""
    _check_repo(repo)
    if base_id is None and not is_hub_id(base):
        raise InputError(_local_base(base, "hub_base_id"))


def _check_arguments(found: ModelFolder, repo: str, base_id: str | None) -> None:
    _check_repo(repo)
    if found.kind == "run":
        raise InputError(
            f"the folder must hold an adapter or a merged model, got {found.path} with neither; finish the run"
        )
    if base_id is not None and not is_hub_id(base_id):
        raise InputError(f"base-id must be OWNER/NAME of a model on the Hub, got {base_id!r}; correct it")
    weights = "adapter_model.safetensors" if found.kind == "adapter" else "model*.safetensors"
    if not any(found.path.glob(weights)):
        raise InputError(f"the folder must hold {weights}, got {found.path} without; pickled weights are not pushed")


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"the repository must be OWNER/NAME on the Hub, got {repo!r}; correct it") from error


def _base_id(found: ModelFolder, given: str | None) -> str | None:
    if given is not None or found.base is None:
        return given
    if is_hub_id(found.base):
        return found.base
    # A merged model loads without its base: there the name is only said in the card.
    if found.kind == "model":
        return None
    raise InputError(_local_base(found.base, "--base-id"))


def _local_base(base: str, option: str) -> str:
    return (
        f"the base must be OWNER/NAME of a model on the Hub, got {base!r}, which nobody else has; say with {option} which "
        "model it is"
    )


def _license(api: HfApi, base: str | None) -> dict[str, str]:
    """The base's licence as its card names it; empty if that cannot be known from here."""
    if base is None:
        return {}
    try:
        card = api.model_info(base).card_data
    # A licence that is not found must not stop a push; what else is wrong will.
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled):
        return {}
    return {} if card is None else {key: str(card[key]) for key in _LICENSE_KEYS if card.get(key)}


def _uploads(found: ModelFolder, card: str, base: str | None) -> list[Upload]:
    names = {found.base: base} if found.base and base else {}
    patterns = _FILES[found.kind]
    paths = [
        path
        for path in sorted(found.path.iterdir())
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
    ]
    uploads = [Upload(CARD, card.encode(), "the card")]
    uploads += [_upload(path, names) for path in paths]
    if found.curve is not None and found.curve.parent != found.path:
        uploads.append(Upload(CURVE, found.curve))
    places = [found.path, *([Path(found.base).expanduser()] if found.base and "/" in found.base else [])]
    for upload in uploads:
        for finding in find_private(_text(upload), paths=[place for place in places if place.is_absolute()]):
            raise InputError(
                f"no file that goes up must hold a credential or a local path, got {finding.what} in {upload.name}, line "
                f"{finding.line}; remove it there, and if it was a credential, revoke it"
            )
    return uploads


def _upload(path: Path, names: dict[str, str]) -> Upload:
    """The file, local paths in it replaced where it is JSON whose strings are names."""
    if path.suffix not in (".json", ".jsonl") or path.name in _VOCABULARY:
        return Upload(path.name, path)
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    indent = None if path.suffix == ".jsonl" else 2
    try:
        before = [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path.name} must be JSON, got a damaged file in {path.parent}; save it again") from error
    after = [without_paths(value, names) for value in before]
    if after == before:
        return Upload(path.name, path)
    written = "".join(json.dumps(value, indent=indent, ensure_ascii=False) + "\n" for value in after)
    return Upload(path.name, written.encode(), "local names replaced")


def _text(upload: Upload) -> str:
    """What of a file can hold words: all of a text file, the metadata of a safetensors file."""
    if isinstance(upload.content, bytes):
        return upload.content.decode()
    if upload.content.suffix == ".safetensors":
        with upload.content.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return json.dumps(json.loads(file.read(length)).get("__metadata__", {}), indent=0)
    return "" if upload.content.suffix in _BINARY else upload.content.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _one_line(folder: Path, repo: str, token: str) -> Iterator[None]:
    """Turns what goes wrong between here and the Hub into one line, in which no token is."""
    try:
        yield
    except InputError:
        raise
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
        message = hide_credentials(_explain(error, repo).replace(token, "<redacted>"))
        # Without its cause: a request's text may hold the token, and a traceback shows it.
        raise InputError(f"{message}; the card is in {folder}, and the same command goes on") from None


def _explain(error: BaseException, repo: str) -> str:
    causes = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    status = next(
        (c.response.status_code for c in causes if isinstance(c, HfHubHTTPError) and c.response is not None), None
    )
    if status == 401:
        return f"the token must be valid, got one that the Hub does not know for {repo} (401); hf auth login"
    if status in (403, 404):
        return (
            f"the token must have the right to write to {repo}, got {status}; take a write token, or a name of your own"
        )
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "the Hub must be reachable, got offline mode; unset HF_HUB_OFFLINE"
    if any(isinstance(cause, httpx2.TransportError | ConnectionError) for cause in causes):
        return f"the Hub must be reachable, got {type(causes[-1]).__name__} at {constants.ENDPOINT}; check the network"
    # The outermost says what was being done, the innermost what went wrong.
    told = dict.fromkeys(
        line.strip() for cause in (error, causes[-1]) for line in str(cause).splitlines() if line.strip()
    )
    return f"the Hub must take {repo}, got {' '.join(list(told)[:3]) or type(error).__name__}"


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """No progress bars where there is no terminal."""
    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _table(uploads: list[Upload], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("")
    for upload in uploads:
        table.add_row(upload.name, _size(upload.size), upload.note)
    return table


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
