"""`qriemann train`, `plan` and `check`: what the settings alone show to be wrong comes first, then torch, then the work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qriemann.cli.parser import Commands, arg
from qriemann.errors import InputError
from qriemann.folder.files import ROW_FILES, check_exists

if TYPE_CHECKING:
    from qriemann.config import Settings
    from qriemann.training.display import PlainView

COMMANDS = Commands()
_LOADING = "loading torch, transformers and TRL"
# Keys that may name a local file, with the endings that only a file has.
_PATHS = {
    "model_name_or_path": (".gguf",),
    "dataset_name": ROW_FILES,
    "dataset_eval_name": ROW_FILES,
    "chat_template_path": (".jinja", ".j2"),
}
_FILE = arg("file", metavar="FILE.yaml", help="the settings; --key value overrides them")


@COMMANDS.add(
    "train",
    "train an adapter as a YAML file says",
    arg("file", nargs="?", metavar="FILE.yaml", help="the settings; --key value overrides them"),
    arg("--help-keys", action="store_true", help="list this project's keys; SFTConfig's are taken too"),
    takes_pairs=True,
)
def _train(file: str | None, help_keys: bool, pairs: list[str]) -> None:
    if help_keys:
        from qriemann.config import describe_keys

        for name, default, text in describe_keys():
            print(f"{name:28} {default:16} {text}")
    elif file is None:
        raise InputError("train needs a YAML file; see qriemann train --help")
    else:
        run_training(file, pairs)


def run_training(path: str | None, pairs: Sequence[str]) -> int:
    """Trains as the YAML file, if there is one, and the `--key value` pairs say; returns the exit status 0."""
    settings, view = _begin(path, pairs)
    from qriemann.checkpoints.starting_point import look_at_output

    output = look_at_output(settings)
    with view.doing(_LOADING):
        from qriemann.training.prepare import prepare
        from qriemann.training.train import train
    try:
        result = train(prepare(settings, output=output, view=view), view=view)
    except KeyboardInterrupt:
        print("qriemann: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        raise
    # Closes the loggers and the process group, which nothing after this needs.
    result.trainer.end()
    return 0


@COMMANDS.add(
    "plan",
    "say what a run will need, from the model's configuration alone",
    _FILE,
    arg("--vram", type=float, metavar="GIB", help="memory of the card: what fits it, and what to change"),
    arg("--all-cards", action="store_true", help="the same for the usual sizes of cards"),
    takes_pairs=True,
)
def _plan(file: str, vram: float | None, all_cards: bool, pairs: list[str]) -> None:
    from qriemann.config import load_settings
    from qriemann.training.display import make_view

    settings = load_settings(file, pairs)
    _refuse_missing_paths(settings, data=False)
    view = make_view("auto")
    with view.doing(_LOADING):
        from qriemann.memory.plan import describe, describe_cards, plan, plan_cards
    with view.doing(f"planning {settings.model_name_or_path}"):
        shown = describe_cards(plan_cards(settings)) if all_cards else describe(plan(settings, vram))
    view.console.print(shown)


@COMMANDS.add(
    "check",
    "look at the rows, and take the longest batch through the model on this machine",
    _FILE,
    arg("--vram", type=float, metavar="GIB", help="memory to keep to, where the card has more"),
    arg("--html", metavar="FILE", help="write a page: sample rows as the model reads them, counts over all"),
    takes_pairs=True,
)
def _check(file: str, vram: float | None, html: str | None, pairs: list[str]) -> None:
    settings, view = _begin(file, pairs)
    if html is not None and (Path(html).expanduser().is_dir() or not Path(html).expanduser().parent.is_dir()):
        raise InputError(f"html must name a file in a folder that exists, got {html!r}")
    with view.doing(_LOADING):
        from qriemann.training.check import check
        from qriemann.training.prepare import prepare
    check(prepare(settings, view=view, to_train=False), vram, view.console, html)


def _begin(path: str | None, pairs: Sequence[str]) -> tuple[Settings, PlainView]:
    from qriemann.config import load_settings
    from qriemann.training.display import make_view

    settings = load_settings(path, pairs)
    settings.named("model_name_or_path")
    settings.named("dataset_name")
    _refuse_missing_paths(settings)
    return settings, make_view(settings.display)


def _refuse_missing_paths(settings: Settings, *, data: bool = True) -> None:
    """Raises InputError for a value that can only be a local path and is none; `data` says whether datasets count."""
    for key, endings in _PATHS.items():
        value = settings.trl.get(key) or getattr(settings, key, None)
        if not value or (key.startswith("dataset") and not data):
            continue
        if Path(value).suffix.lower() in endings or value.startswith(("/", "./", "../", "~")):
            check_exists(value, key)
