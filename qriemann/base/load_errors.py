"""Why transformers could not load a model, and what to do, in one line."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

from qriemann.base.gguf import EMBEDDED_MODEL
from qriemann.errors import InputError, causes

_DAMAGE_ERRORS = (struct.error, IndexError, SafetensorError)
# Messages of these explain themselves; others mean little without their type.
_TELLING_ERRORS = (OSError, ValueError, ImportError)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what loading `name` raises in the block into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    # Broken files make transformers raise exceptions of any type.
    except Exception as error:
        raise InputError(_explain(name, error)) from error


def _explain(name: str, error: BaseException) -> str:
    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes(error))

    if caused_by(hub_errors.GatedRepoError):
        return f"{name}: this model is gated; accept its terms on the Hub, then hf auth login"
    if caused_by(hub_errors.RevisionNotFoundError):
        return f"{name}: the model has no such revision; give a branch, tag or commit of it"
    if caused_by(hub_errors.RepositoryNotFoundError):
        return f"{name}: no such model on the Hub; check the spelling, and if it is private, hf auth login first"
    if "use_safetensors=True" in str(error) or "no file named model.safetensors" in str(error):
        return (
            f"weights must be in safetensors, got none in {name!r}; a pickle can run code: save the model again with "
            "save_pretrained, or, if you trust it, allow_pickle=True (of train and check: --allow pickle)"
        )
    if caused_by(hub_errors.HFValidationError):
        return f"model must be a Hub id, a local folder, a .gguf file or {EMBEDDED_MODEL!r}, got {name!r}"
    if caused_by(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError):
        return (
            f"{name}: the Hub cannot be reached, and there is no such folder here nor such a model in the Hub cache; check "
            f"the connection, or give a local folder, a .gguf file or {EMBEDDED_MODEL!r}"
        )
    if caused_by(*_DAMAGE_ERRORS):
        return f"{name}: the model's files are damaged or cut short; download or convert it again"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    kind = hint = ""
    if not isinstance(error, _TELLING_ERRORS):
        kind, hint = f"{type(error).__name__}: ", "; check its config.json and tokenizer"
    # A failed validation of the configuration names the field on one line and the mistake on the next.
    if lines[0].endswith(":") and len(lines) > 1:
        kind, lines = "", [" ".join(lines[:2])]
    if Path(name).is_file():
        hint = "; the file may be damaged or cut short"
    reason = f"{kind}{lines[0]}".strip(" :") or type(error).__name__
    return f"model must be a causal language model that transformers can load, got {name!r}: {reason}{hint}"
