"""Trains what was prepared and leaves the adapter with its records in the output folder."""

import errno
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback

from qriemann.checkpoints.protect import protect
from qriemann.checkpoints.saving import find_numeric_defect, is_failed_save, save_adapter, save_failed
from qriemann.checkpoints.signals import GracefulStop
from qriemann.checkpoints.starting_point import OutputFolder, look_at_output
from qriemann.checkpoints.step_guard import StepEvent
from qriemann.config import Settings
from qriemann.data.defects import refuse
from qriemann.device import explaining_memory
from qriemann.distributed import is_main_process, run_on_main
from qriemann.errors import InputError
from qriemann.folder import records
from qriemann.folder.contents import CURVE, ROWS, read_folder
from qriemann.folder.lock import hold
from qriemann.memory.auto_batch import AutoBatch, BatchFit
from qriemann.memory.dry_run import DryRun, cheapest_change
from qriemann.release.charts import plot_losses
from qriemann.training.display import PlainView, make_view
from qriemann.training.monitor import Monitor
from qriemann.training.outcome import TrainResult, describe_run, figures, show_result, since, summarize
from qriemann.training.prepare import Prepared
from qriemann.training.rate_callback import measured_rate
from qriemann.training.trainer import build_trainer
from qriemann.upstream import quiet

# What a disk that is full or failing raises, whatever was being written.
_DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)


def train(
    prepared: Prepared, *, callbacks: Sequence[TrainerCallback] = (), view: PlainView | None = None
) -> TrainResult:
    """Trains the adapter and saves it, with its records, in the settings' output folder.

    Args:
        prepared: from `prepare`; its model is trained in place, so it serves for one training.
        callbacks: further callbacks of the trainer.
        view: where progress goes; None makes the one that the settings name.

    Raises:
        InputError: for anything that the user can fix; before the first step, nothing has been written or overwritten.
    """
    settings, output = prepared.settings, prepared.output or look_at_output(prepared.settings)
    view = view or make_view(settings.display)
    with quiet(bars=view.console.is_terminal), ExitStack() as held:
        refuse(prepared.defects, settings.allow, view.note)
        # Nothing is written before this, and the lock takes with it what an error leaves empty.
        run_on_main(lambda: held.enter_context(hold(output.path)))
        output.refuse_changed()
        for line in prepared.found.passed_over:
            view.note(f"passed over {line}")
        if settings.resume is not None:
            beginning = f"the beginning: {output.path} holds no checkpoint"
            view.note(f"resuming from {prepared.found.path or beginning}")
        result = _Training(prepared, output, view, held.enter_context(GracefulStop()), callbacks).run()
        if result.trainer.is_world_process_zero():
            publish(settings, prepared.push_to, view)
    return result


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


class _Training:
    """A trainer with all that a run adds to it, and the record of the run in `run.json`."""

    def __init__(
        self,
        prepared: Prepared,
        output: OutputFolder,
        view: PlainView,
        stop: GracefulStop,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.prepared, self.output, self.folder, self.view, self.stop = prepared, output, output.path, view, stop
        settings = prepared.settings
        self.described = describe_run(prepared, self.folder)
        self.monitor = Monitor(view, self.folder, prepared.args.device, self._begin)
        self.trainer = build_trainer(prepared, [*prepared.initialization, self.monitor, stop, *callbacks])
        if settings.dry_run:
            # AutoBatch measures the longest batch itself.
            fitted = settings.auto_batch
            DryRun(self.trainer, prepared.data, allow=settings.allow, note=view.note, training_batch=not fitted)
        self.guard = protect(
            self.trainer,
            max_skipped_steps=settings.max_skipped_steps,
            run=prepared.fingerprints,
            on_event=self._note_event,
            note=view.note,
        )
        if settings.auto_batch:
            AutoBatch(self.trainer, report=self._keep_fit)

    def run(self) -> TrainResult:
        """Trains, saves the adapter and completes the record; whatever ends the run is recorded too."""
        checkpoint = self.prepared.found.path
        try:
            with explaining_memory("training", self._cheapest_change):
                self.trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            if not self.stop.saved:
                self._save_adapter()
            self.stop.stop_at_once()
            result = summarize(self.prepared, self.folder, self.trainer, self.monitor)
            if self.trainer.is_world_process_zero():
                self._finish(result)
        except BaseException as error:
            self._fail(error)
            raise
        return result

    def _begin(self, step: int) -> None:
        self.output.begin_run(step, self.described)
        records.write_json(self.folder / ROWS, self.prepared.rows)

    def _cheapest_change(self) -> str:
        if not self.trainer.model.training:
            return "lower per_device_eval_batch_size"
        args = self.trainer.args
        return cheapest_change(args, args.per_device_train_batch_size)

    def _save_adapter(self) -> None:
        defect = find_numeric_defect(self.trainer.model)
        if defect is not None:
            raise InputError(
                f"no adapter was saved: in the end it has {defect}; lower the learning rate, or look at the last rows"
            )
        save_adapter(self.trainer, self.folder)

    def _finish(self, result: TrainResult) -> None:
        plot_losses(self.folder / CURVE, records.read_metrics(self.folder))
        ended = {"status": "finished", "wall_clock_s": result.wall_clock_s, "result": figures(result)}
        records.write_json(self.folder / records.RUN, {**self._record(), **ended})
        if self.prepared.settings.display != "none":
            show_result(result, self.view.console)

    def _fail(self, error: BaseException) -> None:
        """Records how the run ended, and turns a failed write into an error that the user can fix."""
        self.view.stop()
        if self.monitor.begun:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}"
            ended = {"status": status, "reason": str(error) or None, "wall_clock_s": since(self.prepared.started)}
            # The disk may be what failed.
            with suppress(OSError):
                records.write_json(self.folder / records.RUN, {**self._record(), **ended})
        if is_failed_save(error) or (isinstance(error, OSError) and error.errno in _DISK_FAILURES):
            raise save_failed(self.folder, error) from error

    def _note_event(self, event: StepEvent) -> None:
        if is_main_process():
            self.view.note(str(event))
            records.append_metrics(self.folder, event.as_record())
            records.write_json(self.folder / records.RUN, self._record())

    def _keep_fit(self, fit: BatchFit) -> None:
        self.view.note(str(fit))
        self.described["auto_batch"] = asdict(fit)
        if self.monitor.begun:
            records.write_json(self.folder / records.RUN, self._record())

    def _record(self) -> dict[str, Any]:
        """The content of `run.json` so far."""
        events = [event for event in records.read_metrics(self.folder) if "skipped" in event or "spike" in event]
        taken = {
            "done": self.trainer.state.global_step,
            "skipped": self.guard.skipped_steps,
            "spikes": self.guard.spikes,
        }
        rate = measured_rate(self.trainer.state) or self.trainer.args.learning_rate
        return {**self.described, "learning_rate": rate, "steps": {**taken, "events": events}}
