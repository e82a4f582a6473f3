"""Where a run starts: whether it may use its output folder, which checkpoint it resumes from, what it clears."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qriemann.checkpoints.manifest import FoundCheckpoint, find_content_defect, find_defect, whole_checkpoint
from qriemann.errors import InputError, listed
from qriemann.folder import records


def starting_point(folder: Path, *, resume: str | None, overwrite: bool, allow: Sequence[str]) -> FoundCheckpoint:
    """The checkpoint to resume from, if any; writes nothing.

    `auto` in a folder where no save was ever finished starts anew, so one command both starts and continues a run.

    Args:
        resume: `auto`, a checkpoint's folder, or None for a new run.
        allow: with `unverified` in it, a named checkpoint needs no manifest.

    Raises:
        InputError: the folder holds a run that is neither resumed nor replaced, or nothing to resume from.
    """
    check_folder(folder, resume=resume, overwrite=overwrite)
    found = FoundCheckpoint(None, files=_files(folder, resume))
    if resume == "auto" and _nothing_was_saved(folder):
        unfinished = records.checkpoint_folders(folder)
        found.passed_over = [f"{path.name}: its save was not finished" for path in unfinished]
    elif resume == "auto":
        found = replace(_newest(folder), files=found.files)
    elif resume is not None:
        found.path = Path(resume)
        defect = find_defect(found.path)
        if defect is not None and "unverified" not in allow:
            raise InputError(
                f"resume must be a complete checkpoint, got {resume!r}: {defect}; if you know that it is, --allow unverified"
            )
        if (broken := find_content_defect(found.path)) is not None:
            raise InputError(f"{resume} cannot be resumed from: {broken}; name an older one")
    return found


def refuse_changed(found: FoundCheckpoint, folder: Path, *, resume: str | None, overwrite: bool) -> None:
    """Raises InputError where `starting_point` might find something else by now; reads no file, only sizes and times."""
    check_folder(folder, resume=resume, overwrite=overwrite)
    if found.files != _files(folder, resume):
        raise InputError(f"{folder} changed while the run was being prepared; start the run again")


def _files(folder: Path, resume: str | None) -> dict[str, tuple[int, int]]:
    """Size and time of change, in ns, of every file of the checkpoints that a run may resume from."""
    folders = [] if resume is None else records.checkpoint_folders(folder)
    folders += [] if resume in (None, "auto") else [Path(resume)]
    status = {str(path): path.stat() for inner in folders for path in inner.rglob("*") if path.is_file()}
    return {path: (found.st_size, found.st_mtime_ns) for path, found in status.items()}


def check_folder(folder: Path, *, resume: str | None, overwrite: bool) -> None:
    """Raises what `starting_point` raises, as far as names of files can tell; imports no torch."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir must be a folder, got the file {folder}; name another")
    if resume is None:
        found = records.run_files(folder)
        if found and not overwrite:
            names = listed(path.name for path in found)
            raise InputError(
                f"output_dir must not hold a run already, got {folder} with {names}; add --resume to continue it, "
                "--overwrite to replace it, or name another folder"
            )
    elif resume != "auto" and not Path(resume).is_dir():
        raise InputError(f"{resume}: no such folder; give --resume a checkpoint's folder, or nothing for the newest")
    elif resume == "auto" and not _has_manifests(folder) and not _nothing_was_saved(folder):
        _newest(folder)


def _newest(folder: Path) -> FoundCheckpoint:
    return whole_checkpoint(folder, asked="resume", remedy="name another folder, or start anew with --overwrite")


def _nothing_was_saved(folder: Path) -> bool:
    """Whether no run was here, or one that was killed before its first checkpoint was complete."""
    # Foreign checkpoints, or an adapter without checkpoints: never treat the folder as empty.
    theirs = records.checkpoint_folders(folder) and not (folder / records.RUN).exists()
    finished = any(path.name.startswith("adapter_") for path in records.run_files(folder))
    return not (theirs or finished or _has_manifests(folder))


def _has_manifests(folder: Path) -> bool:
    return any((path / records.MANIFEST).exists() for path in records.checkpoint_folders(folder))


def begin_run(folder: Path, *, resume: str | None, overwrite: bool, step: int, described: dict[str, Any]) -> None:
    """Clears what an earlier run wrote beyond the starting point, and writes `run.json`."""
    if resume:
        # A run that starts anew logs the evaluation before its first step again, too.
        records.rewind_metrics(folder, step if described["resumed_from"] else -1)
    elif overwrite:
        records.remove_run(folder)
    records.write_run(folder, described)
