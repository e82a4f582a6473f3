"""`qriemann train`, `plan` and `check`: what the settings alone show to be wrong comes first, then torch, then the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qriemann.config import Settings, load_settings
from qriemann.training.display import PlainView, make_view, no_view
from qriemann.training.preflight import preflight, refuse_missing_paths
from qriemann.upstream import quiet

_LOADING = "loading torch, transformers and TRL"


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


def run_check(path: str, pairs: Sequence[str], vram_gib: float | None) -> None:
    """Checks the run that the YAML file and the pairs describe, on this machine.

    Raises:
        InputError: as `qriemann.check`.
    """
    settings, view = _begin(path, pairs, to_train=False)
    with quiet(), view.doing(_LOADING):
        from qriemann.training.check import check
        from qriemann.training.prepare import prepare
    check(prepare(settings, view=view, to_train=False), vram_gib, view.console)


def run_plan(path: str, pairs: Sequence[str], vram_gib: float | None, *, all_cards: bool) -> None:
    """Prints what the run will need.

    Raises:
        InputError: as `qriemann.plan`.
    """
    settings = load_settings(path, pairs)
    refuse_missing_paths(settings, data=False)
    view = make_view("auto")
    with quiet(), view.doing(_LOADING):
        from qriemann.memory.plan import describe, describe_cards, plan, plan_cards
    with quiet(), view.doing(f"planning {settings.model_name_or_path}"):
        shown = describe_cards(plan_cards(settings)) if all_cards else describe(plan(settings, vram_gib))
    view.console.print(shown)


def _begin(path: str | None, pairs: Sequence[str], *, to_train: bool) -> tuple[Settings, PlainView]:
    settings = load_settings(path, pairs)
    preflight(settings, to_train=to_train)
    # The processes of a launcher would each draw the same.
    return settings, make_view(settings.display) if os.environ.get("RANK", "0") == "0" else no_view()
