"""The end of a run: the card, `report.html`, and the push if the settings ask for one."""

from pathlib import Path
from typing import Any

from qriemann.config import Settings
from qriemann.folder.contents import read_folder
from qriemann.training.display import PlainView


def push_target(settings: Settings, model: Any) -> str | None:
    """The repository to push to at the end; None for none."""
    trl = settings.trl
    repository = settings.push
    if repository is None and trl.get("push_to_hub"):
        repository = trl.get("hub_model_id") or Path(settings.output_dir).name
    if repository is not None:
        from qriemann.release.push import check_push

        base = settings.model_name_or_path if model is None else model.name_or_path
        check_push(repository, base or "", settings.hub_base_id)
    return repository


def publish(settings: Settings, repository: str | None, view: PlainView) -> None:
    """Writes card and report into the run's folder; pushes the adapter if there is a repository for it."""
    from qriemann.release.card import write_card
    from qriemann.release.report import write_report

    folder = settings.output_dir
    with view.doing("writing the card and the report"):
        write_card(read_folder(folder))
        write_report(folder)
    if repository is not None:
        from qriemann.release.push import push

        push(
            folder,
            repository,
            private=settings.trl.get("hub_private_repo"),
            base_id=settings.hub_base_id,
            token=settings.trl.get("hub_token"),
            console=view.console,
        )
