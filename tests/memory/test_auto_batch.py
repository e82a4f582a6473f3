"""Rows cut into parts that fit: the same training, whatever the cut, and no step lost where the memory falls short."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qriemann import LocallyOptimalInit
from qriemann.config import settings_from
from qriemann.errors import InputError
from qriemann.memory.auto_batch import AutoBatch, BatchFit, _parts
from qriemann.training.prepare import prepare
from qriemann.training.train import train
from tests.memory.conftest import allocated_peak
from tests.recipe_fixtures import chat_rows
from tests.runs import assert_same, logged, outcome, protected_trainer

# 8 rows a step.
SETTINGS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3, "save_strategy": "no"}
# One cut sums in another order than the other; the optimizer's polar multiplies that by the condition of a momentum.
SAME_TRAINING = {"rtol": 1e-4, "atol": 1e-5}


class ShortMemory:
    """A first layer that is out of memory above so many rows, or tokens of one row; from a call on if told so."""

    def __init__(self, limit: int, *, dimension: int = 0, after_step: int = -1) -> None:
        self.limit, self.dimension, self.after_step = limit, dimension, after_step
        self.seen: list[int] = []

    def install(self, trainer) -> None:
        self.state = trainer
        trainer.model.get_base_model().model.layers[0].register_forward_pre_hook(self.check)

    def check(self, module, inputs) -> None:
        size = inputs[0].shape[self.dimension]
        if self.state.state.global_step > self.after_step and size > self.limit:
            # As CUDA's allocator raises it.
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.seen.append(size)


def trained(folder, *, auto=False, memory=None, resume=None, callbacks=None, **settings):
    trainer, _ = protected_trainer(folder, callbacks=callbacks, **{**SETTINGS, **settings})
    choices: list[BatchFit] = []
    fit = AutoBatch(trainer, report=choices.append) if auto else None
    if memory is not None:
        memory.install(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, fit, choices


def assert_close(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], **SAME_TRAINING, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("limit", [1, 5])
def test_the_largest_part_that_fits_is_taken_and_trains_as_the_whole_does(tmp_path, limit):
    plain, _, _ = trained(tmp_path / "plain")
    memory = ShortMemory(limit)
    trainer, _, (choice,) = trained(tmp_path / "auto", auto=True, memory=memory)
    # The largest divisor of 8 that fits.
    assert (choice.rows, choice.rows_per_step, choice.fallbacks) == ({1: 1, 5: 4}[limit], 8, 0)
    assert max(memory.seen) == choice.rows
    assert choice.longest_tokens == max(len(row) for row in trainer.train_dataset["input_ids"])
    assert_close(outcome(trainer), outcome(plain))
    for key in ("loss", "grad_norm", "num_tokens"):
        for (_, ours), (_, theirs) in zip(logged(trainer, key), logged(plain, key), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_what_the_measuring_drew_is_not_missing_later(tmp_path):
    options = {"lora": {"lora_dropout": 0.3}}
    # Dropout sees the whole batch at once in both.
    plain, _, _ = trained(tmp_path / "plain", per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)
    trainer, _, _ = trained(tmp_path / "auto", auto=True, **options)
    assert_same(outcome(trainer), outcome(plain))


def test_the_measured_bytes_are_those_of_the_allocator(tmp_path):
    trainer, fit, _ = trained(tmp_path, auto=True)
    rows = [trainer.train_dataset[4]] * 64
    batch = trainer.data_collator(rows)
    measured = fit._measure(rows)
    peak = allocated_peak(lambda: fit._take_parts(trainer.model, [batch]))
    # What operations take for themselves while they run is in the allocator's number alone.
    assert measured == pytest.approx(peak, rel=0.1)


def test_a_step_without_memory_is_taken_again_in_halves_and_nothing_of_it_is_lost(tmp_path):
    plain, _, _ = trained(tmp_path / "plain")
    memory = ShortMemory(2, after_step=0)
    trainer, _, choices = trained(tmp_path / "auto", auto=True, memory=memory)
    # Measured while there was memory; 8 and 4 were too many in the second step.
    assert [(c.rows, c.fallbacks) for c in choices] == [(8, 0), (4, 1), (2, 2)]
    assert_close(outcome(trainer), outcome(plain))
    for key in ("loss", "num_tokens"):
        for (_, ours), (_, theirs) in zip(logged(trainer, key), logged(plain, key), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(logged(trainer)) == 3


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_keeps_the_choice_and_ends_in_the_bits_of_an_uninterrupted_one(tmp_path):
    saving = {"save_strategy": "steps"}
    whole, _, choices = trained(tmp_path / "whole", auto=True, memory=ShortMemory(3, after_step=0), **saving)
    assert [c.rows for c in choices] == [8, 4, 2]
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", auto=True, memory=ShortMemory(3, after_step=0), callbacks=[Interrupt()], **saving)
    checkpoint = str(tmp_path / "cut" / "checkpoint-2")
    # With memory for all rows: a new measurement would choose 8.
    resumed, _, kept = trained(tmp_path / "cut", auto=True, resume=checkpoint, **saving)
    assert [(c.rows, c.fallbacks) for c in kept] == [(2, 2)]
    assert_same(outcome(resumed), outcome(whole))


def test_a_row_that_does_not_fit_by_itself_is_refused_with_its_length(tmp_path):
    with pytest.raises(InputError, match=r"8 tokens do not fit.*activation_checkpointing"):
        trained(tmp_path, auto=True, memory=ShortMemory(0))


def test_what_free_memory_does_not_hold_is_not_tried(tmp_path, monkeypatch):
    memory = ShortMemory(10**6)
    trainer, fit, _ = trained(tmp_path / "measured", auto=True)
    row = trainer.train_dataset[4]
    one, held = fit._measure([row]), fit._held_later()
    # 90 % of this is what two rows take at most, and less than four.
    monkeypatch.setattr("qriemann.memory.auto_batch.free_bytes", lambda device: (2 * one + held + 1) / 0.9)
    _, _, (choice,) = trained(tmp_path / "auto", auto=True, memory=memory)
    assert choice.rows == 2
    assert max(memory.seen) == 2


def test_another_error_is_not_mistaken_for_a_lack_of_memory(tmp_path):
    class Broken(ShortMemory):
        def check(self, module, inputs):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trained(tmp_path, auto=True, memory=Broken(0))


@pytest.mark.parametrize("padding_free", [True, False])
def test_parts_are_what_the_collator_makes_of_their_rows(padding_free):
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    rows = [{"input_ids": list(range(10 * n, 10 * n + length))} for n, length in enumerate((5, 3, 4, 2, 6))]
    fit = BatchFit(rows=2, rows_per_step=5, tokens=8, longest_tokens=6, needed_gib=0, free_gib=0)
    expected = [collate(rows[:2]), collate(rows[2:4]), collate(rows[4:])]
    for part, wanted in zip(_parts(collate(rows), fit), expected, strict=True):
        assert part.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(torch.as_tensor(part[key]), torch.as_tensor(value)), key


class NoRoom(TrainerCallback):
    def on_init_end(self, args, state, control, **kwargs):
        kwargs["model"].get_base_model().model.layers[0].register_forward_pre_hook(self.check)

    def check(self, module, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def recipe(settings, write_rows):
    values = {
        **settings,
        "quantize": "nf4",
        "dataset_name": str(write_rows(chat_rows(12))),
        "max_steps": 2,
        "auto_batch": True,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "no",
        "display": "plain",
        "use_cpu": True,
    }
    return settings_from(values)


def test_a_recipe_asks_for_it_by_one_key_and_run_json_keeps_the_choice(tmp_path, recipe, capsys):
    train(prepare(recipe))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["status"] == "finished"
    assert (run["auto_batch"]["rows"], run["auto_batch"]["rows_per_step"]) == (6, 6)
    assert (run["config"]["per_device_train_batch_size"], run["config"]["gradient_accumulation_steps"]) == (3, 2)
    assert "auto_batch: 6 rows at once, 1 times a step" in capsys.readouterr().out


def test_a_recipe_whose_longest_row_does_not_fit_ends_before_anything_is_written(tmp_path, recipe):
    with pytest.raises(InputError, match="tokens do not fit"):
        train(prepare(recipe), callbacks=[NoRoom()])
    assert not (tmp_path / "out").exists()


def test_gradient_bases_see_no_more_rows_at_once_than_fit(tmp_path):
    memory = ShortMemory(2)
    trained(tmp_path / "run", auto=True, memory=memory, callbacks=[LocallyOptimalInit(batches=2)], max_steps=1)
    # Four passes over two batches of two rows, then a step of eight rows.
    assert memory.seen[-12:] == [2] * 12
