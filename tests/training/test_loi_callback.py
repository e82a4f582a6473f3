"""Locally optimal initialization as a callback of stock trainers: what it starts from, and what it leaves as it was."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTTrainer

import qriemann
from qriemann import InputError, LocallyOptimalInit
from qriemann.training.sample import lean_loss
from tests.dense import shares_kept
from tests.models import (
    dense_gradients,
    load_nf4,
    next_token_loss,
    relative,
    save_tiny_base,
    tiny_llama,
    token_batch,
    trainer_settings,
    variants,
    with_lora,
    word_tokenizer,
)
from tests.recipe_fixtures import train_on
from tests.runs import assert_same, outcome
from tests.runs import sft_trainer as plain_trainer

RANK = 4
LORA = {"r": RANK, "lora_alpha": 8, "target_modules": "all-linear"}
sft_trainer = functools.partial(plain_trainer, lora={"lora_dropout": 0.1})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


class Watch(TrainerCallback):
    """After the callbacks before it: the points at the start, the batches that are trained on, and torch's generator."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.at_start = {name: point.point().dense() for name, (_, point) in variants(model).items()}
        self.bases = {name: (p.point().u.clone(), p.point().v.clone()) for name, (_, p) in variants(model).items()}
        self.trained: list[Tensor] = []
        self.random = torch.get_rng_state()
        embedding = model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _, inputs: self.trained.append(inputs[0].clone()))


@pytest.mark.parametrize(("kind", "start"), [("sft", "offset"), ("transformers", "zero")])
def test_training_begins_where_the_tangent_space_holds_the_gradient_of_the_data(kind, start, tmp_path, capsys):
    # Six batches of four are all the rows, so the sample is the data in whatever order.
    initialize, watch = LocallyOptimalInit(6), Watch()
    if kind == "sft":
        trainer = sft_trainer(tiny_llama(), tmp_path, start, callbacks=[initialize, watch])
        rows = torch.tensor(trainer.train_dataset["input_ids"])
    else:
        rows = token_batch(rows=24, length=9)
        trainer = Trainer(
            model=with_lora(tiny_llama(), r=RANK),
            args=TrainingArguments(**trainer_settings(tmp_path)),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch"),
            optimizer_cls_and_kwargs=qriemann.for_trainer("riemannion", lr=0.05),
            callbacks=[initialize, watch],
        )
    trainer.train()
    reference = with_lora(tiny_llama(), r=RANK)
    qriemann.attach(reference, start="zero")
    gradients = dense_gradients(tiny_llama(), reference, [rows])
    assert min(shares_kept(watch.bases, gradients, 2 * RANK if start == "offset" else RANK).values()) > 0.99
    printed = capsys.readouterr().err
    assert "4 passes over 6 batches" in printed
    assert "done in" in printed


def test_the_order_of_the_data_and_all_random_numbers_are_those_of_a_run_without_it(tmp_path):
    runs = []
    for callbacks in ([], [LocallyOptimalInit(6)]):
        watch = Watch()
        trainer = sft_trainer(
            tiny_llama(),
            tmp_path,
            callbacks=[*callbacks, watch],
            max_steps=-1,
            num_train_epochs=2,
            activation_checkpointing=False,
        )
        trainer.train()
        runs.append((watch, torch.get_rng_state()))
    (plain, random), (initialized, random_initialized) = runs
    assert len(plain.trained) == 12
    assert all(torch.equal(a, b) for a, b in zip(plain.trained, initialized.trained, strict=True))
    assert torch.equal(plain.random, initialized.random)
    assert torch.equal(random, random_initialized)
    name = next(iter(plain.bases))
    assert relative(initialized.bases[name][0], plain.bases[name][0]) > 0.5


def test_the_loss_of_the_probe_is_the_models_own_without_the_logits_of_the_vocabulary(tmp_path):
    vocabulary = 3000
    trainer = sft_trainer(tiny_llama(vocabulary=vocabulary), tmp_path, activation_checkpointing=False)
    batch = next(iter(trainer.get_train_dataloader()))
    largest: dict[str, int] = {}
    losses = {}
    for name, compute in (("lean", lean_loss), ("whole", lambda model, batch: model(**batch).loss)):
        sizes = []
        weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

        def keep(tensor: Tensor, sizes: list[int] = sizes, weights: set[int] = weights) -> Tensor:
            sizes.append(0 if tensor.untyped_storage().data_ptr() in weights else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses[name] = compute(trainer.model.eval(), batch)
        largest[name] = max(sizes)
    assert losses["lean"].item() == pytest.approx(losses["whole"].item(), rel=1e-5)
    tokens = batch["input_ids"].shape[0] * (batch["input_ids"].shape[1] - 1)
    assert largest["whole"] >= tokens * vocabulary
    assert largest["lean"] < tokens * vocabulary / 4


# Resuming.


@pytest.mark.parametrize("start", ["offset", "zero"])
def test_a_resumed_run_keeps_its_start_and_ends_bit_for_bit_where_an_uninterrupted_one_does(
    start, base, tmp_path, capsys
):
    def trainer(folder: Path) -> SFTTrainer:
        return sft_trainer(
            load_nf4(base), folder, start, callbacks=[LocallyOptimalInit(2)], save_strategy="steps", save_steps=2
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    assert LoraConfig.from_pretrained(tmp_path / "whole" / "checkpoint-2").r == (
        2 * RANK if start == "offset" else RANK
    )
    assert "skipped" not in capsys.readouterr().err
    torch.manual_seed(99)  # another process: whatever was drawn before must not matter
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert "locally optimal initialization is skipped: the run resumes at step 2" in capsys.readouterr().err
    assert_same(outcome(whole), outcome(resumed))


# Several processes.


def _start_of_a_rank(rank: int, address: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = with_lora(tiny_llama(), r=RANK)
    qriemann.locally_optimal_(model, [token_batch(rank, 4, 20)], next_token_loss)
    torch.save([point.point().dense() for _, point in variants(model).values()], f"{out}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_different_batches_start_at_the_point_of_all_batches(tmp_path):
    out = str(tmp_path / "rank")
    torch.multiprocessing.spawn(_start_of_a_rank, (f"file://{tmp_path / 'meet'}", out), nprocs=2)
    model = with_lora(tiny_llama(), r=RANK)
    qriemann.locally_optimal_(model, [token_batch(rank, 4, 20) for rank in (0, 1)], next_token_loss)
    for rank in (0, 1):
        for (name, (_, point)), got in zip(variants(model).items(), torch.load(f"{out}{rank}"), strict=True):
            assert relative(got, point.point().dense()) < 1e-3, name


# Which start.


# What is refused.


def test_a_method_off_the_manifold_is_refused_with_the_remedy(tmp_path):
    optimizer = torch.optim.AdamW, {"lr": 1e-4}
    trainer = sft_trainer(tiny_llama(), tmp_path, optimizer=optimizer, callbacks=[LocallyOptimalInit(2)])
    with pytest.raises(InputError, match=r"needs an adapter on the manifold.*for_trainer\('riemannion'\)"):
        trainer.train()
    assert not variants(trainer.model)


@pytest.mark.parametrize("streaming", [False, True])
def test_more_batches_than_there_are_is_refused_with_both_numbers(streaming, tmp_path, capsys):
    trainer = sft_trainer(tiny_llama(), tmp_path, callbacks=[LocallyOptimalInit(7)])
    if streaming:
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(InputError, match="batches must be at most the data's 6 of 4 rows, got 7"):
        trainer.train()
    assert "locally optimal initialization" not in capsys.readouterr().err


class ReadOnce(torch.utils.data.IterableDataset):
    """Rows that are gone when they were read."""

    def __init__(self) -> None:
        self.left = [{"input_ids": row, "labels": row} for row in token_batch(rows=24, length=9)]

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop()


def test_data_that_can_be_read_once_is_refused_before_a_row_is_gone():
    dataset, model, args = ReadOnce(), with_lora(tiny_llama(), r=RANK), TrainingArguments(use_cpu=True)
    qriemann.attach(model, seed=5)
    loader: Any = torch.utils.data.DataLoader(dataset, 4)
    with pytest.raises(InputError, match="an iterator that can be read once"):
        LocallyOptimalInit(2).on_train_begin(args, TrainerState(), None, model=model, train_dataloader=loader)
    assert len(dataset.left) == 24


# https://github.com/huggingface/trl: disable_gradient_checkpointing of TRL 1.16 uses names that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
@pytest.mark.parametrize("given", [False, True])
def test_batches_without_labels_are_refused_unless_a_loss_is_given(given, tmp_path):
    rows = [{"prompt": "one ", "chosen": "two", "rejected": "nine"}] * 16
    options = {"loss_fn": lambda model, batch: next_token_loss(model, batch["input_ids"])} if given else {}
    trainer = DPOTrainer(
        model=tiny_llama(),
        processing_class=word_tokenizer(),
        args=DPOConfig(**trainer_settings(tmp_path, max_steps=1, max_length=32)),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(**LORA),
        callbacks=[LocallyOptimalInit(2, **options)],
    )
    trainer.optimizer_cls_and_kwargs = qriemann.for_trainer("riemannion", lr=0.05)
    if given:
        trainer.train()
        assert trainer.state.global_step == 1
    else:
        with pytest.raises(InputError, match=r"batches must hold labels, .* got \[.*'input_ids'.*\]; or pass loss_fn"):
            trainer.train()


def test_a_value_out_of_range_is_refused_at_the_call():
    with pytest.raises(InputError, match="oversampling must be an integer >= 0, got -1"):
        LocallyOptimalInit(oversampling=-1)


# In a recipe.


@pytest.fixture
def settings(settings) -> dict[str, Any]:
    return {
        **settings,
        "quantize": "nf4",
        "lora_r": RANK,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "no",
        "use_cpu": True,
        "init": "loi",
        "init_kwargs": {"batches": 3, "power_iterations": 0},
    }


def test_a_recipe_asks_for_it_by_one_word(settings, capsys):
    watch = Watch()
    result = train_on({**settings, "start": "offset", "alpha": 0.25, "lora_r": 2 * RANK}, callbacks=[watch])
    assert "locally optimal initialization: 2 passes over 3 batches" in capsys.readouterr().err
    assert json.loads((result.output_dir / "run.json").read_text())["config"]["init"] == "loi"
    for name, x in watch.at_start.items():
        assert torch.linalg.svdvals(x)[:RANK] == pytest.approx(0.25, rel=1e-5), name
    assert LoraConfig.from_pretrained(result.output_dir).r == 2 * RANK


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "lora"}, "init must be"),
        ({"init_kwargs": {"batch": 3}}, "init_kwargs must be among batches, .*, got 'batch'"),
        ({"init_kwargs": {"batches": 0}}, "batches must be an integer >= 1, got 0"),
        ({"init": "random"}, "init_kwargs must be left out without init: loi, got"),
        ({"init_kwargs": {"batches": 70}}, "at most the data's 6 of 4 rows, got 70"),
    ],
    ids=str,
)
def test_a_recipe_with_a_bad_value_is_refused_and_leaves_no_trace(changes, message, settings):
    with pytest.raises(InputError, match=message):
        train_on({**settings, **changes})
    assert not Path(settings["output_dir"]).exists()
