"""The output folder of a run: whether it may be used, what is cleared at the first write, and no trace of a refused run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from qriemann.errors import InputError
from qriemann.training import records
from qriemann.training.config import RunConfig


def check_output_folder(config: RunConfig) -> str | None:
    """The checkpoint to resume from, if that was asked for."""
    folder, resume = Path(config.sft.output_dir), config.qriemann.resume
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir must be a folder, got the file {folder}; name another")
    if resume == "auto":
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if checkpoint is None:
            raise InputError(
                f"resume must find a checkpoint-* folder in output_dir, got none in {folder}; leave resume out"
            )
        return checkpoint
    if resume is not None:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise InputError(
                f"resume must be a checkpoint folder with a trainer_state.json, got {resume!r}; check the path"
            )
        return resume
    found = records.run_files(folder)
    if found and not config.qriemann.overwrite:
        names = ", ".join(path.name for path in found[:3])
        raise InputError(
            f"output_dir must not hold a run already, got {folder} with {names}; add --resume to continue it, --overwrite "
            "to replace it, or name another folder"
        )
    return None


def check_same_data(folder: Path, data_print: str) -> None:
    path = folder / records.RUN
    before = records.read_json(path).get("data", {}).get("fingerprint") if path.exists() else None
    if before is not None and before != data_print:
        raise InputError(
            f"resume must go on with the rows that the run started with, got other tokens than those of {path} "
            f"({data_print[:12]} instead of {before[:12]}); restore the dataset, or start anew with --overwrite"
        )


@contextmanager
def no_trace_of_refusal(folder: Path) -> Iterator[None]:
    """Removes the empty folder that the trainer makes in its constructor, if the run is then refused."""
    existed = folder.exists() and any(folder.iterdir())
    try:
        yield
    except InputError:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def begin_run(folder: Path, config: RunConfig, step: int, described: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if config.qriemann.resume:
        records.rewind_metrics(folder, step)
    elif config.qriemann.overwrite:
        records.remove_run(folder)
    write_run(folder, described)


def write_run(folder: Path, described: dict[str, Any]) -> None:
    records.write_json(folder / records.RUN, described)
