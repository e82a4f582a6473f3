"""What the settings alone show to be wrong, said before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from qriemann.checkpoints.starting_point import check_folder
from qriemann.config import Settings
from qriemann.errors import InputError
from qriemann.folder.files import check_exists

# Keys that may name a local file, with the endings that only a file has.
_PATHS = {
    "model_name_or_path": (".gguf",),
    "dataset_name": (".jsonl", ".json", ".csv", ".parquet"),
    "dataset_eval_name": (".jsonl", ".json", ".csv", ".parquet"),
    "chat_template_path": (".jinja", ".j2"),
}


def preflight(settings: Settings, *, to_train: bool = True) -> None:
    """Raises InputError for a missing model, dataset or file, and for a folder that this run may not use.

    Args:
        settings: of a run that loads its model and its rows itself.
        to_train: whether the output folder will be written to.
    """
    for key, what in (("model_name_or_path", "base model"), ("dataset_name", "dataset")):
        if not getattr(settings, key):
            raise InputError(f"{key} is missing: name the {what}")
    refuse_missing_paths(settings)
    if to_train:
        check_folder(Path(settings.output_dir), resume=settings.resume, overwrite=settings.overwrite)


def refuse_missing_paths(settings: Settings, *, data: bool = True) -> None:
    """Raises InputError for a value that can only be a local path and is none; `data` says whether datasets count."""
    for key, endings in _PATHS.items():
        value = settings.trl.get(key) or getattr(settings, key, None)
        if not value or (key.startswith("dataset") and not data):
            continue
        if Path(value).suffix.lower() in endings or value.startswith(("/", "./", "../", "~")):
            check_exists(value, key)
