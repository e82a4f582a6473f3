"""Where a run starts: whether it may use its output folder, which checkpoint it resumes from, what it clears."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qriemann.checkpoints.manifest import FoundCheckpoint, find_content_defect, find_defect, whole_checkpoint
from qriemann.config import Settings
from qriemann.errors import InputError, listed
from qriemann.folder import records
from qriemann.folder.lock import refuse_if_held


@dataclass(frozen=True)
class OutputFolder:
    """The output folder of a run as it was before the run, and what the run makes of it.

    Attributes:
        resume: `auto`, a checkpoint's folder, or None for a new run.
        overwrite: whether the run replaces the one that is there.
        unsaved: whether no run was there, or one that ended before its first checkpoint was complete.
        seen: the files of the run that is there and of the checkpoint that is named; those of checkpoints with size and time
            of change in ns.
    """

    path: Path
    resume: str | None
    overwrite: bool
    unsaved: bool
    seen: Mapping[Path, tuple[int, int] | None]

    def find_checkpoint(self, allow: tuple[str, ...]) -> FoundCheckpoint:
        """The checkpoint to resume from, verified, if any.

        `auto` in a folder where no save was ever finished starts anew, so one command both starts and continues a run.

        Args:
            allow: with `unverified` in it, a named checkpoint needs no manifest.

        Raises:
            InputError: there is nothing to resume from.
        """
        if self.resume == "auto" and self.unsaved:
            unfinished = records.checkpoint_folders(self.path)
            return FoundCheckpoint(None, [f"{path.name}: its save was not finished" for path in unfinished])
        if self.resume == "auto":
            return _newest(self.path)
        if self.resume is None:
            return FoundCheckpoint(None)
        named = Path(self.resume)
        defect = find_defect(named)
        if defect is not None and "unverified" not in allow:
            raise InputError(
                f"resume must be a complete checkpoint, got {self.resume!r}: {defect}; if you know that it is, "
                "--allow unverified"
            )
        if (broken := find_content_defect(named)) is not None:
            raise InputError(f"{self.resume} cannot be resumed from: {broken}; name an older one")
        return FoundCheckpoint(named)

    def refuse_changed(self) -> None:
        """Raises InputError where the run might start elsewhere by now; reads no file, only sizes and times."""
        if not self.overwrite and self.seen != _status(records.run_files(self.path), self.resume):
            raise InputError(f"{self.path} changed while the run was being prepared; start the run again")

    def begin_run(self, step: int, described: dict[str, Any]) -> None:
        """Clears what an earlier run wrote beyond the starting point, and writes `run.json`."""
        if self.resume:
            # A run that starts anew logs the evaluation before its first step again, too.
            records.rewind_metrics(self.path, step if described["resumed_from"] else -1)
        elif self.overwrite:
            records.remove_run(self.path)
        records.write_json(self.path / records.RUN, described)


def look_at_output(settings: Settings) -> OutputFolder:
    """The output folder of a run, if names of files say that the run may use it; writes nothing and imports no torch.

    Raises:
        InputError: another run holds the folder, it holds a run that is neither resumed nor replaced, or nothing to resume
            from.
    """
    folder, resume = Path(settings.output_dir), settings.resume
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir must be a folder, got the file {folder}; name another")
    # Looking takes the lock for a moment, which one process of a run can do.
    if os.environ.get("RANK", "0") == "0":
        refuse_if_held(folder)
    found = records.run_files(folder)
    if found and resume is None and not settings.overwrite:
        raise InputError(
            f"output_dir must not hold a run already, got {folder} with {listed(path.name for path in found)}; add --resume "
            "to continue it, --overwrite to replace it, or name another folder"
        )
    if resume not in (None, "auto") and not Path(resume).is_dir():
        raise InputError(f"{resume}: no such folder; give --resume a checkpoint's folder, or nothing for the newest")
    checkpoints = [path for path in found if path.is_dir()]
    complete = any((path / records.MANIFEST).exists() for path in checkpoints)
    # Foreign checkpoints, or an adapter without checkpoints: never treat the folder as empty.
    foreign = bool(checkpoints) and folder / records.RUN not in found
    finished = any(path.name.startswith("adapter_") for path in found)
    if resume == "auto" and not complete and (foreign or finished):
        _newest(folder)
    unsaved = not (complete or foreign or finished)
    return OutputFolder(folder, resume, settings.overwrite, unsaved, _status(found, resume))


def _status(found: list[Path], resume: str | None) -> dict[Path, tuple[int, int] | None]:
    folders = [path for path in found if path.is_dir()] + ([] if resume in (None, "auto") else [Path(resume)])
    status = {path: path.stat() for folder in folders for path in folder.rglob("*") if path.is_file()}
    # Where a program resumes a run that it has just ended, the main process may still be writing the record of its end.
    records_there: dict[Path, tuple[int, int] | None] = {path: None for path in found if not path.is_dir()}
    return records_there | {path: (stat.st_size, stat.st_mtime_ns) for path, stat in status.items()}


def _newest(folder: Path) -> FoundCheckpoint:
    return whole_checkpoint(folder, asked="resume", remedy="name another folder, or start anew with --overwrite")
