"""What must not leave this machine with a model: credentials are refused, local paths become names.

No scan finds every secret. This one knows the usual shapes and the values of this process' own environment.
"""

import os
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

REDACTED = "<redacted>"
# Hub, forges, model APIs, clouds, chat; private keys.
_CREDENTIAL = re.compile(
    r"\b(?:hf_|api_org_)[A-Za-z0-9]{20,}\b|\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bgithub_pat_\w{30,}\b|\bglpat-[\w-]{20,}\b"
    r"|\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{24,}\b|\bAKIA[A-Z0-9]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{20,}\b"
    r"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"
)
# Names that end in "token" and are vocabulary entries, not credentials.
PUBLIC_TOKEN_KEYS = {"eos_token", "pad_token", "bos_token"}
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_?key|credentials?)$", re.IGNORECASE)
_SECRET_NAME = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
# Shorter values of such variables ("1", "true", "default") are words that any file may hold.
_SHORTEST_SECRET = 12
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# Two parts at least: "/no_think" is a word of a chat model.
_LOCAL_PATH = re.compile(r"(/[^/\s]+){2,}/?|~/\S+|file://.+|([A-Za-z]:[\\/]|\\\\).+")


def hide_credentials(text: str) -> str:
    """The text with everything that looks like, or is, a credential of this process replaced."""
    for _, value in _own_secrets():
        text = text.replace(value, REDACTED)
    return _CREDENTIAL.sub(REDACTED, text)


def redact(value: Any, key: str = "") -> Any:
    """A JSON-ready copy in which the value of every key that names a credential is replaced."""
    if value is not None and key not in PUBLIC_TOKEN_KEYS and _SECRET_KEY.search(key):
        return REDACTED
    if isinstance(value, dict):
        return {str(name): redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def find_private(text: str, *, paths: Iterable[Path] = ()) -> list[tuple[int, str]]:
    """Credentials and local paths in a text, each as its line and what it is, never what it says."""
    found = [(match.start(), "a credential") for match in _CREDENTIAL.finditer(text)]
    found += [(text.index(value), f"the value of {name}") for name, value in _own_secrets() if value in text]
    places = {str(place) for path in (Path.home(), Path.cwd(), *paths) for place in (path, path.resolve())}
    for place in places:
        # "/" or "/root" alone is a word of many vocabularies; a path is followed by more of it.
        match = re.search(re.escape(place.rstrip("/\\")) + r"[/\\]\w", text)
        if match and len(Path(place).parts) > 1:
            found.append((match.start(), "a local path"))
    return sorted({(text.count("\n", 0, position) + 1, what) for position, what in found})


def without_paths(value: Any, names: dict[str, str]) -> Any:
    """A copy of a JSON value in which every local path is replaced.

    Args:
        names: what to write instead of a string that is a key of it; any other absolute path keeps its last part.
    """
    if isinstance(value, dict):
        return {key: without_paths(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, names) for item in value]
    if isinstance(value, str):
        return names.get(value, _last_part(value) if is_local_path(value) else value)
    return value


def is_local_path(text: str) -> bool:
    """Whether the whole string is an absolute path, or one from the home folder."""
    return _LOCAL_PATH.fullmatch(text) is not None


def _last_part(path: str) -> str:
    return (PureWindowsPath(path) if _WINDOWS_PATH.match(path) else PurePosixPath(path)).name or REDACTED


def _own_secrets() -> list[tuple[str, str]]:
    """(name, value) of the credentials that this process knows."""
    found = [
        (name, value)
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and not is_local_path(value)
    ]
    # A tenth of a second that a line about a wrong key need not wait for, where no token can be.
    from huggingface_hub import get_token

    try:
        token = get_token()
    except OSError:  # The file that it would be in cannot be read.
        token = None
    return [*found, ("the Hub token", token)] if token else found
