"""What a run does for others at its end: the card, `report.html`, and the push if one was asked for."""

from pathlib import Path
from typing import Any

from rich.console import Console

from qriemann.config.settings import RunConfig
from qriemann.folder.contents import read_folder
from qriemann.release.card import write_card
from qriemann.release.push import check_push, push
from qriemann.release.report import write_report


def take_over_push(config: RunConfig, model: Any) -> tuple[str | None, str | None]:
    """The repository to push to at the end, None for none, and the token; the trainer is told neither.

    Raises:
        InputError: the push could not work, which is to be known before the training rather than after it.
    """
    sft = config.sft
    repo = config.qriemann.push or (sft.hub_model_id or Path(sft.output_dir).name if sft.push_to_hub else None)
    # The trainer would send every save, training_args.bin and its own card with it.
    sft.push_to_hub = False
    # training_args.bin, which it writes into every save, would hold it in clear.
    token, sft.hub_token = sft.hub_token, None
    if repo is not None:
        base = config.model.model_name_or_path if model is None else model.name_or_path
        check_push(repo, base or "", config.qriemann.hub_base_id)
    return repo, token


def publish(config: RunConfig, repo: str | None, console: Console, *, token: str | None = None) -> None:
    """Writes card and report into the run's folder; pushes the adapter if there is a repository for it."""
    folder = config.sft.output_dir
    write_card(read_folder(folder))
    write_report(folder)
    if repo is not None:
        private = config.sft.hub_private_repo
        push(folder, repo, private=private, base_id=config.qriemann.hub_base_id, token=token, console=console)
