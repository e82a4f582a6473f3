"""A learning rate that is measured before the first step: what it does to the answers, and that it changes nothing else."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

import qriemann
from qriemann import InputError, MeasuredRate
from qriemann.optim.measured_rate import measure_rate
from qriemann.training.rate_callback import measured_rate
from tests.models import tiny_llama, token_batch, with_lora
from tests.recipe_fixtures import chat_llama, make_tokenizer, train_on
from tests.runs import sft_trainer

METHODS = ("riemannion", "riemannlora", "adamw", "muon", "scaled-adamw")


def answers_of(model):
    return lambda batch: model(batch).logits[:, :-1].flatten(0, 1).float().log_softmax(1)


def loss_of(model):
    return lambda batch: F.nll_loss(answers_of(model)(batch), batch[:, 1:].flatten())


class Factors(TrainerCallback):
    """The trainable parameters and the rate at the start and at the end."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        self.random = torch.get_rng_state()

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.end = [p.detach().clone() for p in model.parameters() if p.requires_grad]


def run(folder, method, callbacks, lora=None, **settings):
    factors = Factors()
    lora = {"lora_dropout": 0.1, **(lora or {})}
    callbacks = [*callbacks, factors]
    trainer = sft_trainer(
        tiny_llama(), folder, lora=lora, optimizer=method, callbacks=callbacks, max_steps=3, **settings
    )
    trainer.train()
    return trainer, factors


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_the_measured_rate_changes_the_answers_by_as_much_as_was_asked(method):
    model, batches = with_lora(tiny_llama()), [token_batch(seed=seed) for seed in range(3)]
    model.eval()
    optimizer = qriemann.optim.methods.METHODS[method].optimizer(model, lr=1e-3)
    answers, loss = answers_of(model), loss_of(model)

    before = {key: value.clone() for key, value in model.state_dict().items()}
    rate, tried = measure_rate(optimizer, batches, loss, answers, change=0.01)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not optimizer.state_dict()["state"] or all("step" not in s for s in optimizer.state_dict()["state"].values())

    # The same in one batch, by a loop of its own.
    with torch.no_grad():
        old = torch.cat([answers(batch) for batch in batches]).double()
    sum(loss(batch) / len(batches) for batch in batches).backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    with torch.no_grad():
        new = torch.cat([answers(batch) for batch in batches]).double()
    change = (old.exp() * (old - new)).sum(1).mean().item()
    assert change == pytest.approx(0.01, rel=0.1)
    assert len(tried) <= 6


@pytest.mark.parametrize("method", ["riemannion", "adamw"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_a_run_with_a_measured_rate_is_to_the_bit_the_run_with_that_number(tmp_path, method, warmup):
    chosen = MeasuredRate(0.01, rows=8)
    own = {"seed": 3} if method == "riemannion" else {}
    measured, its = run(tmp_path / "a", qriemann.for_trainer(method, **own), [chosen], warmup_steps=warmup)
    rate = measured_rate(measured.state)
    _, plain = run(tmp_path / "b", qriemann.for_trainer(method, lr=rate, **own), [], warmup_steps=warmup)
    assert all(map(torch.equal, its.start, plain.start))
    assert torch.equal(its.random, plain.random)
    assert all(map(torch.equal, its.end, plain.end))
    assert not all(map(torch.equal, its.start, its.end))


class Stop(TrainerCallback):
    """Ends the first training after its second step, with a checkpoint."""

    def __init__(self):
        self.done = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.done:
            self.done = control.should_training_stop = control.should_save = True


def test_a_training_is_resumed_by_the_trainer_that_it_was_interrupted_in(tmp_path):
    def trainer(name, *callbacks):
        callbacks = [MeasuredRate(0.01, rows=8), *callbacks]
        method = qriemann.for_trainer("riemannion", seed=3)
        made = sft_trainer(tiny_llama(), tmp_path / name, optimizer=method, callbacks=callbacks)
        qriemann.protect(made)
        return made

    whole, cut = trainer("whole"), trainer("cut", Stop())
    whole.train()
    cut.train()
    cut.train(resume_from_checkpoint=True)
    ends = [[p for p in t.model.parameters() if p.requires_grad] for t in (whole, cut)]
    assert all(map(torch.equal, *ends))


def test_what_is_trained_beside_the_adapter_keeps_its_rate(tmp_path):
    method = qriemann.for_trainer("riemannion", adamw_lr=3e-4, seed=3)
    trainer, _ = run(tmp_path, method, [MeasuredRate(0.01, rows=8)], {"modules_to_save": ["lm_head"]})
    adapter, rest = trainer.optimizer.param_groups
    assert (adapter["on_adapter"], rest["on_adapter"]) == (True, False)
    assert adapter["initial_lr"] == measured_rate(trainer.state) != 5e-3
    assert rest["initial_lr"] == 3e-4


def test_the_recipe_records_the_rate_and_a_resumed_run_keeps_it(tmp_path):
    def settings(name, **more):
        rows = tmp_path / "rows.jsonl"
        rows.write_text(
            "".join(json.dumps({"prompt": f"{i} and", "completion": f" {i + 1}"}) + "\n" for i in range(12))
        )
        return {
            "output_dir": str(tmp_path / name),
            "dataset_name": str(rows),
            "learning_rate": "auto",
            "lora_r": 2,
            "quantize": "none",
            "eval_size": 0,
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "save_steps": 2,
            "display": "none",
        } | more

    tokenizer = make_tokenizer()

    def train(name, callbacks=(), **more):
        model = chat_llama(tokenizer, initializer_range=0.3)
        return train_on(settings(name, **more), model=model, tokenizer=tokenizer, callbacks=callbacks)

    whole = train("whole")
    written = json.loads((tmp_path / "whole/run.json").read_text())
    assert written["config"]["learning_rate"] == "auto"
    assert written["learning_rate"] == measured_rate(whole.trainer.state) != 5e-3
    rates = [line["learning_rate"] for line in whole.trainer.state.log_history if "learning_rate" in line]
    assert max(rates) == pytest.approx(written["learning_rate"])

    train("cut", callbacks=[Stop()])
    resumed = train("cut", resume="auto")
    ends = [[p for p in r.trainer.model.parameters() if p.requires_grad] for r in (whole, resumed)]
    assert all(map(torch.equal, *ends))
    assert json.loads((tmp_path / "cut/run.json").read_text())["learning_rate"] == written["learning_rate"]


def test_bad_values_are_refused():
    for bad, words in (({"change": 0}, "above 0"), ({"change": float("nan")}, "above 0"), ({"rows": 0}, ">= 1")):
        with pytest.raises(InputError, match=words):
            MeasuredRate(**bad)


def test_a_change_that_no_rate_makes_is_refused():
    model = with_lora(tiny_llama())
    optimizer = qriemann.Riemannion(model, lr=1e-3)
    batch = token_batch()
    answers, loss = answers_of(model), loss_of(model)

    with pytest.raises(InputError, match=r"no learning rate from .* changes the answers by 1e\+06 nats"):
        measure_rate(optimizer, [batch], loss, answers, change=1e6)


def _rate_of(model, batches):
    optimizer = qriemann.Riemannion(model, lr=1e-3, seed=0)
    return measure_rate(optimizer, batches, loss_of(model), answers_of(model), change=0.01)[0]


def _rate_of_a_rank(rank: int, address: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(_rate_of(with_lora(tiny_llama()).eval(), [token_batch(rank, 4, 20)]), f"{out}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_different_batches_find_the_rate_of_all_batches(tmp_path):
    out = str(tmp_path / "rank")
    torch.multiprocessing.spawn(_rate_of_a_rank, (f"file://{tmp_path / 'meet'}", out), nprocs=2)
    alone = _rate_of(with_lora(tiny_llama()).eval(), [token_batch(rank, 4, 20) for rank in (0, 1)])
    assert torch.load(f"{out}0") == torch.load(f"{out}1") == pytest.approx(alone, rel=0.01)
