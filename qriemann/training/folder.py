"""The output folder of a run: whether it may be used, where a run goes on from, and what is cleared at the first write."""

from pathlib import Path
from typing import Any

from qriemann.errors import InputError
from qriemann.training import records
from qriemann.training.checkpoints import FoundCheckpoint, find_content_defect, find_defect, whole_checkpoint
from qriemann.training.config import RunConfig


def starting_point(config: RunConfig) -> FoundCheckpoint:
    """The checkpoint to resume from, if that was asked for; writes nothing.

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
        found = whole_checkpoint(folder, asked="resume", remedy="leave resume out")
    else:
        found = FoundCheckpoint(Path(resume))
        defect = find_defect(Path(resume))
        if defect is not None and "unverified" not in allow:
            raise InputError(
                f"resume must be a complete checkpoint folder, got {resume!r}: {defect}; check the path, or add "
                "--allow unverified if you know that it is whole"
            )
    broken = find_content_defect(found.path) if found.path else None
    if broken is not None:
        raise InputError(
            f"resume must be a checkpoint that can be loaded, got {found.path}: {broken}; name an older one"
        )
    return found


def begin_run(folder: Path, config: RunConfig, step: int, described: dict[str, Any]) -> None:
    if config.qriemann.resume:
        records.rewind_metrics(folder, step)
    elif config.qriemann.overwrite:
        records.remove_run(folder)
    write_run(folder, described)


def write_run(folder: Path, described: dict[str, Any]) -> None:
    records.write_json(folder / records.RUN, described)
