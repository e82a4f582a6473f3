"""A folder counts as a checkpoint once `manifest.json`, written last, lists every file's size and SHA-256.

The Trainer writes a checkpoint into its final folder, file by file, so a folder named checkpoint-N proves nothing. Every file
is flushed to disk first, then the manifest is flushed under another name and renamed into place: that is the moment the
checkpoint exists. A failure before it, a power cut included, leaves a folder that does not count; a later change to a file no
longer matches the sums. Older checkpoints are deleted only after that moment.

The command line imports this module before torch, which takes seconds; only `find_content_defect` needs it.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qriemann.errors import InputError
from qriemann.folder.files import open_like_its_folder, replace_text, sha256, sync
from qriemann.folder.records import MANIFEST, checkpoint_folders, checkpoint_step, delete_checkpoint

_FORMAT = 1
# Without these the trainer would resume with a fresh optimizer and from step 0.
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


@dataclass
class FoundCheckpoint:
    """The newest checkpoint that verifies, and why others were passed over.

    Attributes:
        passed_over: one line for each folder that looks newer and does not count.
    """

    path: Path | None
    passed_over: list[str] = field(default_factory=list)


def commit(folder: Path, step: int, run: Mapping[str, Any] | None = None) -> None:
    """Turns the files of a folder into a checkpoint.

    Raises:
        OSError: the disk is full or refuses; the folder does not count then.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        open_like_its_folder(path)
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync(inner)
    serial = 1 + max((_serial(other) for other in checkpoint_folders(folder.parent)), default=0)
    content = {"format": _FORMAT, "step": step, "serial": serial, "files": files, "run": dict(run or {})}
    replace_text(folder / MANIFEST, json.dumps(content, indent=1))
    sync(folder.parent)


def find_defect(folder: Path) -> str | None:
    """Why the folder is not a complete checkpoint, or None; reads every byte of it once."""
    content = read_manifest(folder)
    if content is None:
        return f"it has no readable {MANIFEST}, so its save was not finished, or it was saved without one"
    files = content["files"]
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size if path.is_file() else None
            if size != expected.get("bytes"):
                return f"{name} has {'no' if size is None else size} bytes instead of {expected.get('bytes')}"
            if sha256(path) != expected.get("sha256"):
                return f"{name} is not the file that was saved: its SHA-256 differs"
        except (OSError, ValueError) as error:
            return f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}"
    missing = _missing(content)
    if missing:
        return f"it holds no {missing[0]} (save_only_model?), without which no run can resume exactly"
    if not any(name.endswith(".safetensors") for name in files):
        return "it holds no weights as safetensors; pickled weights are not loaded"
    return None


def find_content_defect(folder: Path) -> str | None:
    """Why no run can resume from the files of a folder, or None; its manifest may be missing or anyone's."""
    import torch
    from transformers import TrainerState
    from transformers.trainer_pt_utils import safe_globals

    from qriemann.adapters.saved_tensors import stored_tensors
    from qriemann.base.tensors import find_not_finite

    try:
        for path in sorted(folder.rglob("*.safetensors")):
            for _ in stored_tensors(path):
                pass
    except InputError as error:
        return str(error)
    # What the trainer loads; training_args.bin, a pickle of classes, it only writes.
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"):
        if not (folder / name).exists():
            continue
        try:
            with safe_globals():
                broken = find_not_finite(torch.load(folder / name, map_location="cpu", weights_only=True))
        # A damaged file makes the unpickler raise almost anything.
        except Exception as error:
            return f"{name} cannot be loaded with weights_only=True: {type(error).__name__}"
        if broken is not None:
            return f"{name} holds numbers that are not finite in {broken}"
    try:
        step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"trainer_state.json cannot be read: {type(error).__name__}"
    return None if type(step) is int and step >= 0 else f"trainer_state.json has the step {step!r}"


def newest_checkpoint(folder: str | os.PathLike[str]) -> FoundCheckpoint:
    """The checkpoint of a run's folder that was completed last among those that verify and can be loaded.

    Reads the bytes of one checkpoint twice, or of more if the first does not verify.
    """
    folders = checkpoint_folders(Path(folder))
    committed = _by_completion(folders)
    found = FoundCheckpoint(None)
    for candidate in reversed(committed):
        defect = find_defect(candidate) or find_content_defect(candidate)
        if defect is None:
            found.path = candidate
            break
        found.passed_over.append(f"{candidate.name}: {defect}")
    step = -1 if found.path is None else checkpoint_step(found.path)
    for unfinished in (path for path in folders if path not in committed and checkpoint_step(path) > step):
        found.passed_over.append(f"{unfinished.name}: {find_defect(unfinished)}")
    return found


def whole_checkpoint(folder: str | os.PathLike[str], *, asked: str, remedy: str) -> FoundCheckpoint:
    """As `newest_checkpoint`, for callers that cannot continue without one."""
    found = newest_checkpoint(folder)
    if found.path is None:
        passed_over = f" ({'; '.join(found.passed_over)})" if found.passed_over else ""
        raise InputError(f"{asked} finds no complete checkpoint in {folder}{passed_over}; {remedy}")
    return found


def last_complete(folder: str | os.PathLike[str]) -> str:
    """Names the newest checkpoint that verifies, for messages."""
    last = newest_checkpoint(folder).path
    return f"{folder} holds no complete checkpoint" if last is None else f"the last complete checkpoint is {last}"


def rotate(folder: Path, keep: int, *, spare: Collection[Path] = ()) -> list[str]:
    """Deletes old checkpoints, and unfinished ones older than the newest; returns a line for each that could not be deleted.

    Keeps the `keep` completed last, the last that a run can resume from, and those to `spare`.
    """
    folders = checkpoint_folders(folder)
    committed = _by_completion(folders)
    # With save_only_model, the last ones are not among them.
    resumable = [path for path in committed if not _missing(read_manifest(path))]
    last = checkpoint_step(committed[-1])
    kept = {path.resolve() for path in (*committed[-keep:], *resumable[-1:], *spare)}
    problems = []
    for path in folders:
        if path.resolve() in kept or (path not in committed and checkpoint_step(path) > last):
            continue
        try:
            delete_checkpoint(path)
        except OSError as error:
            problems.append(f"{path.name} could not be deleted: {error.strerror or error}")
    return problems


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None where there is none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return None
    files, run, serial = (content.get(key) for key in ("files", "run", "serial"))
    well_formed = isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())
    return content if well_formed and isinstance(run, dict) and isinstance(serial, int) and serial > 0 else None


def _missing(manifest: Mapping[str, Any] | None) -> list[str]:
    """The files that resuming needs and the manifest does not list."""
    return [name for name in _NEEDED if name not in (manifest or {}).get("files", {})]


def _by_completion(folders: list[Path]) -> list[Path]:
    """Those with a manifest, the one completed last at the end."""
    return sorted((path for path in folders if _serial(path) > 0), key=_serial)


def _serial(folder: Path) -> int:
    """The checkpoint's place in the order of completion; 0 for a folder without a manifest."""
    # Not the step, because a run may resume from an older checkpoint, and not the clock, because clocks are set back.
    content = read_manifest(folder)
    return 0 if content is None else content["serial"]
