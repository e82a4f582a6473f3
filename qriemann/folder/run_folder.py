"""The output folder of a run: whether it may be used, where a run goes on from, and what is cleared at the first write."""

from pathlib import Path
from typing import Any

from qriemann.checkpoints.manifest import (
    MANIFEST,
    FoundCheckpoint,
    checkpoint_folders,
    find_content_defect,
    find_defect,
    whole_checkpoint,
)
from qriemann.config.settings import RunConfig
from qriemann.errors import InputError
from qriemann.folder import records


def starting_point(config: RunConfig) -> FoundCheckpoint:
    """The checkpoint to resume from, if that was asked for; writes nothing.

    `auto` in a folder where no save was ever finished is the beginning: the same command starts a run and goes on with it.

    Raises:
        InputError: the folder holds a run that is neither resumed nor replaced, or nothing to resume.
    """
    folder, resume = Path(config.sft.output_dir), config.qriemann.resume
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir must be a folder, got the file {folder}; name another")
    if resume is not None:
        return _checkpoint(folder, resume, allow=config.qriemann.allow)
    found = records.run_files(folder)
    if found and not config.qriemann.overwrite:
        names = ", ".join(path.name for path in found[:3])
        raise InputError(
            f"output_dir must not hold a run already, got {folder} with {names}; add --resume to continue it, --overwrite "
            "to replace it, or name another folder"
        )
    return FoundCheckpoint(None)


def _checkpoint(folder: Path, resume: str, *, allow: list[str]) -> FoundCheckpoint:
    if resume == "auto":
        if _nothing_was_saved(folder):
            unfinished = [f"{path.name}: its save was not finished" for path in checkpoint_folders(folder)]
            return FoundCheckpoint(None, unfinished)
        return whole_checkpoint(folder, asked="resume", remedy="name another folder, or start anew with --overwrite")
    defect = find_defect(Path(resume))
    if defect is not None and "unverified" not in allow:
        raise InputError(
            f"resume must be a complete checkpoint folder, got {resume!r}: {defect}; check the path, or add "
            "--allow unverified if you know that it is whole"
        )
    broken = find_content_defect(Path(resume))
    if broken is not None:
        raise InputError(f"resume must be a checkpoint that can be loaded, got {resume}: {broken}; name an older one")
    return FoundCheckpoint(Path(resume))


def _nothing_was_saved(folder: Path) -> bool:
    """Whether no run was here, or one that was killed before its first checkpoint was complete."""
    checkpoints = checkpoint_folders(folder)
    # Another tool's checkpoints, and an adapter whose run saved none, are somebody's work.
    theirs = checkpoints and not (folder / records.RUN).exists()
    finished = any(path.name.startswith("adapter_") for path in records.run_files(folder))
    return not (theirs or finished or any((path / MANIFEST).exists() for path in checkpoints))


def begin_run(folder: Path, config: RunConfig, step: int, described: dict[str, Any]) -> None:
    if config.qriemann.resume:
        # Of a run that begins anew, the evaluation before the first step, too, is logged again.
        records.rewind_metrics(folder, step if described["resumed_from"] else -1)
    elif config.qriemann.overwrite:
        records.remove_run(folder)
    write_run(folder, described)


def write_run(folder: Path, described: dict[str, Any]) -> None:
    records.write_json(folder / records.RUN, described)
