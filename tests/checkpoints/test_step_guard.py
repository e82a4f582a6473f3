"""A step that is not finite leaves no trace; the truth is a run whose data never had its batch."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from qriemann.errors import InputError
from qriemann.optim.methods import METHODS
from tests.models import WORDS
from tests.runs import assert_same, logged, outcome, protected_trainer

POISON = "twelve"
BATCH = 4


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def clean_rows(count=32):
    return [{"text": " ".join(WORDS[(i * k) % 12] for k in range(1, 4 + i % 5))} for i in range(count)]


def poisoned(rows, row):
    """One row's text with a word that `poison_a_word` makes NaN."""
    return [*rows[:row], {"text": f"one {POISON} two"}, *rows[row + 1 :]]


def poison_a_word(trainer):
    """The embedding of one word is NaN from here on, in training and for that word alone."""
    token = trainer.processing_class.convert_tokens_to_ids(POISON)

    def hook(module, inputs, output):
        return torch.where((inputs[0] == token)[..., None], math.nan, output)

    trainer.model.get_input_embeddings().register_forward_hook(hook)


def spoil_gradient(trainer, backward, value):
    """One layer's gradient is set to a value in one entry, in the given backward pass counted from 1."""
    parameter = next(p for name, p in trainer.model.named_parameters() if "k_proj.lora_A" in name)
    count = 0

    def hook(gradient):
        nonlocal count
        count += 1
        if count == backward:
            gradient = gradient.clone()
            gradient[0, 0] = value
        return gradient

    parameter.register_hook(hook)


def sequential_trainer(folder, rows, **settings):
    """One batch a step in the order of the rows, with dropout, so that every random number counts."""
    defaults = {
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "max_steps": 6,
        "lora": {"lora_dropout": 0.3},
    }
    return protected_trainer(folder, rows=Dataset.from_list(rows), **{**defaults, **settings})


def without_step(rows, step, batches=1):
    return rows[: (step - 1) * BATCH * batches] + rows[step * BATCH * batches :]


def train_without(folder, rows, step, **settings):
    """The same run on rows that never had the step's batches, as many updates long as the other applied."""
    accumulation = settings.get("gradient_accumulation_steps", 1)
    trainer, guard = sequential_trainer(
        folder, without_step(rows, step, accumulation), callbacks=[StopAfter(5)], **settings
    )
    trainer.train()
    assert guard.skipped_steps == 0
    return trainer


@pytest.mark.parametrize(
    ("step", "settings"), [(1, {}), (4, {}), (2, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0})], ids=str
)
def test_a_nan_in_one_sample_leaves_the_rest_as_if_its_batches_had_not_been_there(tmp_path, step, settings):
    rows = poisoned(clean_rows(56), (step - 1) * BATCH * settings.get("gradient_accumulation_steps", 1) + 2)
    trainer, guard = sequential_trainer(tmp_path, rows, **settings)
    poison_a_word(trainer)
    trainer.train()
    reference = train_without(tmp_path, rows, step, **settings)
    assert guard.skipped_steps == 1
    assert_same(outcome(trainer), outcome(reference))
    assert [loss for _, loss in logged(trainer)] == [loss for _, loss in logged(reference)]
    for key in ("entropy", "mean_token_accuracy"):
        assert [value for _, value in logged(trainer, key)] == [value for _, value in logged(reference, key)]


FAST = ("riemannion", "scaled-adamw", "muon")


@pytest.mark.parametrize(
    ("method", "value"),
    [
        *(pytest.param(method, math.nan, marks=[] if method in FAST else [pytest.mark.slow]) for method in METHODS),
        ("riemannion", math.inf),
    ],
)
def test_a_spoiled_gradient_of_one_layer_leaves_every_layer_and_its_state_as_they_were(tmp_path, method, value):
    rows = clean_rows()
    settings = {"method": method, "lora": {"modules_to_save": ["lm_head"]}}
    trainer, guard = sequential_trainer(tmp_path, rows, **settings)
    spoil_gradient(trainer, backward=3, value=value)
    trainer.train()
    assert guard.skipped_steps == 1
    assert_same(outcome(trainer), outcome(train_without(tmp_path, rows, step=3, **settings)))


def test_the_reported_mean_and_norm_are_those_of_the_steps_that_were_taken(tmp_path):
    rows = poisoned(clean_rows(), 2 * BATCH)
    trainer, _ = sequential_trainer(tmp_path, rows, logging_steps=3, max_steps=3)
    poison_a_word(trainer)
    trainer.train()
    reference, _ = sequential_trainer(tmp_path, without_step(rows, 3), max_steps=3, callbacks=[StopAfter(2)])
    reference.train()
    assert logged(trainer, "grad_norm") == [(3, logged(reference, "grad_norm")[-1][1])]
    first, second = (loss for _, loss in logged(reference))
    # Sums of two float32 numbers.
    assert logged(trainer) == [(3, pytest.approx((first + second) / 2, rel=1e-6))]
    assert logged(trainer, "train_loss")[0][1] == pytest.approx((first + second) / 2, rel=1e-6)


def test_an_overflow_of_scaled_gradients_is_skipped_and_lowers_the_scale(tmp_path):
    trainer, guard = sequential_trainer(tmp_path, clean_rows(), max_steps=3)
    # What accelerate does for fp16 on a GPU, with a first scale that overflows.
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with pytest.raises(InputError, match="finite in none of 3 steps"):
        trainer.train()
    assert guard.skipped_steps == 3
    ((_, loss),) = logged(trainer, "train_loss")
    assert math.isnan(loss)
    assert trainer.accelerator.scaler.get_scale() == 2.0**124
    assert trainer.lr_scheduler.last_epoch == 0
    assert all(entry["momentum"].count_nonzero() == 0 for entry in trainer.optimizer.state_dict()["state"].values())


class WriteToFactor(TrainerCallback):
    """Multiplies one factor after a step, as a bug or a careless callback would."""

    def __init__(self, step, by):
        self.step, self.by = step, by

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            next(p for name, p in model.named_parameters() if "q_proj.lora_B" in name).data.mul_(self.by)


@pytest.mark.parametrize(("by", "told"), [(1.2, "4.4e-01"), (1.001, "2.0e-03"), (math.nan, "nan")])
def test_a_factor_that_left_the_manifold_between_saves_stops_the_run_before_a_step_brings_it_back(tmp_path, by, told):
    settings = {"save_strategy": "steps", "save_steps": 2, "callbacks": [WriteToFactor(3, by)]}
    trainer, _ = sequential_trainer(tmp_path, clean_rows(), **settings)
    with pytest.raises(InputError, match=r"checkpoint-2; some other code writes to the factors") as caught:
        trainer.train()
    assert f"max |U^T U - I| = {told} before step 4" in str(caught.value)
    assert not (tmp_path / "checkpoint-4").exists()


MEANS = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")


@pytest.mark.parametrize("settings", [{"logging_steps": 3}, {"logging_strategy": "epoch", "save_strategy": "epoch"}])
def test_every_number_reported_after_a_resume_is_the_uninterrupted_runs(tmp_path, settings):
    settings = {"max_steps": 6, "lora": {"lora_dropout": 0.2}, **settings}
    whole, _ = protected_trainer(tmp_path / "whole", **settings)
    whole.train()
    for step in (3,) if "logging_strategy" in settings else (3, 5):
        resumed, _ = protected_trainer(tmp_path / f"resumed-{step}", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for key in MEANS:
            assert logged(resumed, key) == logged(whole, key), (step, key)


def test_the_mean_at_the_end_of_a_resumed_run_is_that_of_its_own_steps(tmp_path):
    settings = {"max_steps": 4, "gradient_accumulation_steps": 1}
    every, _ = protected_trainer(tmp_path / "every", **settings)
    every.train()
    whole, _ = protected_trainer(tmp_path / "whole", logging_steps=4, **settings)
    whole.train()
    resumed, _ = protected_trainer(tmp_path / "resumed", logging_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    (_, third), (_, fourth) = logged(every)[2:]
    # Sums of four float32 numbers.
    assert logged(resumed, "train_loss")[0][1] == pytest.approx((third + fourth) / 2, rel=1e-6)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_skipped_step_is_told_with_the_rows_of_its_batches(tmp_path, shuffled):
    rows = poisoned(clean_rows(22), 9)
    events, batches = [], []
    strategy = "random" if shuffled else "sequential"
    trainer, _ = sequential_trainer(
        tmp_path,
        rows,
        gradient_accumulation_steps=2,
        max_steps=7,
        train_sampling_strategy=strategy,
        protection={"on_event": events.append},
    )
    poison_a_word(trainer)
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True
    )
    trainer.train()
    of_row = trainer.train_dataset["input_ids"]
    # Three steps an epoch: the poisoned row comes in the first, in the second, and where the third epoch begins with it.
    assert [event.kind for event in events] == ["skipped"] * len(events)
    assert len(events) >= 2
    for event in events:
        assert 9 in event.rows
        # The second batch of an epoch's third step has two rows.
        first = (event.step - 1) * 2
        seen = [ids[ids != 0].tolist() for batch in batches[first : first + 2] for ids in batch]
        assert [of_row[row] for row in event.rows] == seen
        assert f"step {event.step}" in str(event)
        assert "nan" in str(event)


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_the_last_checkpoint_named(tmp_path):
    rows = clean_rows()
    for row in range(2 * BATCH, 5 * BATCH, BATCH):
        rows = poisoned(rows, row)
    settings = {"save_strategy": "steps", "save_steps": 2, "protection": {"max_skipped_steps": 2}}
    trainer, _ = sequential_trainer(tmp_path, rows, **settings)
    poison_a_word(trainer)
    with pytest.raises(InputError, match=r"3 steps in a row up to step 5.*checkpoint-4"):
        trainer.train()


def test_the_counts_go_on_after_a_resume(tmp_path):
    rows = poisoned(clean_rows(), 1 * BATCH)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer, guard = sequential_trainer(tmp_path, rows, **settings)
    poison_a_word(trainer)
    trainer.train()
    resumed, again = sequential_trainer(tmp_path, rows, **settings)
    poison_a_word(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert guard.skipped_steps == again.skipped_steps == 1
    assert_same(outcome(resumed), outcome(trainer))


def test_a_gradient_far_above_the_recent_ones_is_told_unclipped_and_its_step_taken(tmp_path):
    events = []
    settings = {"max_steps": 26, "protection": {"on_event": events.append}}
    trainer, guard = sequential_trainer(tmp_path, clean_rows(), **settings)
    spoil_gradient(trainer, backward=24, value=5000.0)
    trainer.train()
    assert [(event.kind, event.step) for event in events] == [("spike", 24)]
    assert events[0].grad_norm == pytest.approx(5000, rel=1e-3)
    assert events[0].loss == pytest.approx(dict(logged(trainer))[24], rel=1e-6)
    assert (guard.spikes, guard.skipped_steps) == (1, 0)
    assert trainer.lr_scheduler.last_epoch == 26
