"""What the monitor measures, on a made-up clock."""

import io

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from qriemann.training.display import PlainView
from qriemann.training.monitor import Monitor

FIRST_STEP, STEP, EVALUATION, SAVE = 40.0, 10.0, 64.0, 8.0


class Recorder(PlainView):
    """Keeps what it is shown, with the time."""

    def __init__(self, run):
        super().__init__(Console(file=io.StringIO(), width=200))
        self.run, self.predicted, self.waits = run, [], []

    def step(self, step, seconds_left=None):
        self.predicted.append((step, self.run.now, seconds_left))

    def now(self, what, done=0, total=None):
        super().now(what, done, total)
        self.waits.append((what, done, total))


class Run:
    """What the trainer does between its callbacks, with a clock instead of work."""

    def __init__(self, folder, *, first_step=0, steps=20, **arguments):
        self.now, self.seconds = 0.0, {"evaluation": EVALUATION, "save": SAVE}
        self.view = Recorder(self)
        self.monitor = Monitor(self.view, folder, torch.device("cpu"), lambda step: None, clock=lambda: self.now)
        self.args = TrainingArguments(str(folder), use_cpu=True, report_to=[], logging_steps=1, **arguments)
        self.state = TrainerState(
            global_step=first_step, max_steps=steps, num_train_epochs=4, eval_steps=5, save_steps=4, logging_steps=1
        )
        self.control = TrainerControl()
        self.handler = CallbackHandler([DefaultFlowCallback(), self.monitor], None, None, None, None)

    def tell(self, event, **given):
        getattr(self.handler, event)(self.args, self.state, self.control, **given)

    def evaluate(self):
        self.handler.eval_dataloader = range(4)
        for _ in range(4):
            self.now += self.seconds["evaluation"] / 4
            self.tell("on_prediction_step")
        self.tell("on_evaluate", metrics={})

    def log_evaluate_save(self):
        if self.control.should_log:
            self.tell("on_log", logs={"loss": 1.0, "num_tokens": 100.0 * self.state.global_step})
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save:
            self.now += self.seconds["save"]
            self.tell("on_save")

    def train(self):
        first, steps_per_epoch = self.state.global_step + 1, self.state.max_steps // 4
        self.tell("on_train_begin")
        if self.args.eval_on_start:
            self.evaluate()
        for step in range(first, self.state.max_steps + 1):
            self.tell("on_step_begin")
            # Every tenth step the machine does something else.
            self.now += FIRST_STEP if step == first else 3 * STEP if step % 10 == 0 else STEP
            self.state.global_step, self.state.epoch = step, step / steps_per_epoch
            self.tell("on_step_end")
            self.log_evaluate_save()
            if step % steps_per_epoch == 0:
                self.tell("on_epoch_end")
                self.log_evaluate_save()
        self.tell("on_train_end")


@pytest.mark.parametrize("first_step", [0, 6])
def test_the_time_left_counts_evaluations_and_saves_but_not_the_start(tmp_path, first_step):
    steps = first_step + 40
    run = Run(tmp_path, first_step=first_step, steps=steps, eval_strategy="steps", save_strategy="steps")
    run.train()
    assert run.view.predicted[0][2] is None
    seen = run.view.predicted[20:35]
    assert [left for *_, left in seen] == [
        pytest.approx(run.now - at, abs=2 * (EVALUATION + SAVE)) for _, at, _ in seen
    ]
    assert [record.get("eta_s") for record in run.monitor.records] == pytest.approx(
        [left for *_, left in run.view.predicted], abs=0.05
    )


def test_speed_counts_the_seconds_of_steps_alone_and_a_resumed_run_goes_on_counting(tmp_path):
    run = Run(tmp_path, steps=8, eval_strategy="steps", eval_on_start=True, save_strategy="steps")
    run.train()
    seconds = FIRST_STEP + 7 * STEP
    assert run.monitor.tokens_per_s == 800 / seconds
    resumed = Run(tmp_path, first_step=8, steps=9)
    run.state.save_to_json(tmp_path / "state.json")
    resumed.state.stateful_callbacks = TrainerState.load_from_json(tmp_path / "state.json").stateful_callbacks
    resumed.train()
    assert resumed.monitor.tokens_per_s == 900 / (seconds + FIRST_STEP)
    assert resumed.monitor.records[-1]["tokens_per_s"] == round(100 / FIRST_STEP, 1)


def test_an_evaluation_is_shown_batch_by_batch(tmp_path):
    run = Run(tmp_path, steps=20, eval_strategy="steps", eval_on_start=True, save_strategy="steps")
    run.train()
    assert run.view.waits[:6] == [("evaluating", done, 4 if done else None) for done in range(5)] + [("", 0, None)]
