"""`qriemann train`, `plan` and `check`: what the settings alone show to be wrong comes first, then torch, then the work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qriemann.cli.parser import add_command
from qriemann.errors import InputError
from qriemann.upstream import quiet

if TYPE_CHECKING:
    from qriemann.config import Settings
    from qriemann.training.display import PlainView

_LOADING = "loading torch, transformers and TRL"


def add_commands(commands: Any) -> None:
    _add_train(commands)
    _add_plan(commands)
    _add_check(commands)


def _add_train(commands: Any) -> None:
    parser = add_command(commands, "train", _train, "train an adapter as a YAML file says", takes_pairs=True)
    parser.add_argument("file", nargs="?", metavar="FILE.yaml", help="the settings; --key value overrides them")
    parser.add_argument("--help-keys", action="store_true", help="list this project's keys; SFTConfig's are taken too")


def _train(arguments: argparse.Namespace) -> int:
    if arguments.help_keys:
        from qriemann.config import describe_keys

        for name, default, text in describe_keys():
            print(f"{name:28} {default:16} {text}")
        return 0
    if arguments.file is None:
        raise InputError("train needs a YAML file; see qriemann train --help")
    return run_training(arguments.file, arguments.pairs)


def _add_plan(commands: Any) -> None:
    text = "say what a run will need, from the model's configuration alone"
    parser = add_command(commands, "plan", _plan, text, takes_pairs=True)
    parser.add_argument("file", metavar="FILE.yaml", help="the settings; --key value overrides them")
    parser.add_argument(
        "--vram", type=float, metavar="GIB", help="memory of the card: what fits it, and what to change"
    )
    parser.add_argument("--all-cards", action="store_true", help="the same for the usual sizes of cards")


def _plan(arguments: argparse.Namespace) -> None:
    run_plan(arguments.file, arguments.pairs, arguments.vram, all_cards=arguments.all_cards)


def _add_check(commands: Any) -> None:
    text = "look at the rows, and take the longest batch through the model on this machine"
    parser = add_command(commands, "check", _check, text, takes_pairs=True)
    parser.add_argument("file", metavar="FILE.yaml", help="the settings; --key value overrides them")
    parser.add_argument("--vram", type=float, metavar="GIB", help="memory to keep to, where the card has more")
    parser.add_argument(
        "--html", metavar="FILE", help="write a page: sample rows as the model reads them, counts over all"
    )


def _check(arguments: argparse.Namespace) -> None:
    run_check(arguments.file, arguments.pairs, arguments.vram, arguments.html)


def run_training(path: str | None, pairs: Sequence[str]) -> int:
    """Trains as the YAML file and the `--key value` pairs say.

    Args:
        path: the YAML file; None for the command line alone.
        pairs: `--key value` pairs.

    Raises:
        InputError: for anything that the user can mend.
    """
    settings, view = _begin(path, pairs, to_train=True)
    with quiet(), view.doing(_LOADING):
        from qriemann.training.prepare import prepare
        from qriemann.training.train import train
    try:
        result = train(prepare(settings, view=view), view=view)
    except KeyboardInterrupt:
        print("qriemann: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        raise
    # Closes the loggers and the process group, which nothing after this needs.
    result.trainer.end()
    return 0


def run_check(path: str, pairs: Sequence[str], vram_gib: float | None, html: str | None) -> None:
    """Checks the run that the YAML file and the pairs describe, on this machine; `html` is a file for a page about the rows.

    Raises:
        InputError: as `qriemann.check`.
    """
    settings, view = _begin(path, pairs, to_train=False)
    if html is not None and (Path(html).expanduser().is_dir() or not Path(html).expanduser().parent.is_dir()):
        raise InputError(f"html must name a file in a folder that exists, got {html!r}")
    with quiet(), view.doing(_LOADING):
        from qriemann.training.check import check
        from qriemann.training.prepare import prepare
    check(prepare(settings, view=view, to_train=False), vram_gib, view.console, html)


def run_plan(path: str, pairs: Sequence[str], vram_gib: float | None, *, all_cards: bool) -> None:
    """Prints what the run will need.

    Raises:
        InputError: as `qriemann.plan`.
    """
    from qriemann.config import load_settings
    from qriemann.training.display import make_view
    from qriemann.training.preflight import refuse_missing_paths

    settings = load_settings(path, pairs)
    refuse_missing_paths(settings, data=False)
    view = make_view("auto")
    with quiet(), view.doing(_LOADING):
        from qriemann.memory.plan import describe, describe_cards, plan, plan_cards
    with quiet(), view.doing(f"planning {settings.model_name_or_path}"):
        shown = describe_cards(plan_cards(settings)) if all_cards else describe(plan(settings, vram_gib))
    view.console.print(shown)


def _begin(path: str | None, pairs: Sequence[str], *, to_train: bool) -> tuple[Settings, PlainView]:
    from qriemann.config import load_settings
    from qriemann.training.display import make_view, no_view
    from qriemann.training.preflight import preflight

    settings = load_settings(path, pairs)
    preflight(settings, to_train=to_train)
    # The processes of a launcher would each draw the same.
    return settings, make_view(settings.display) if os.environ.get("RANK", "0") == "0" else no_view()
