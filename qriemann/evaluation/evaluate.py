"""`eval`: loss, perplexity and right answers of one model, or of two on the same rows, with 95 % intervals."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache
from rich.console import Console
from rich.table import Table

from qriemann.adapters.attach import load_base
from qriemann.adapters.saved import adapter_folder, read_adapter
from qriemann.device import compute_device, compute_dtype, describe_device, explaining_memory
from qriemann.evaluation.reload import logits_of_rows
from qriemann.evaluation.rows import Rows, load_rows
from qriemann.evaluation.scorers import find_scorer
from qriemann.evaluation.trained import load_trained
from qriemann.upstream import quiet

_RESAMPLES, _LEVEL = 2_000, 0.95
_MAX_ANSWER, _BATCH = 512, 16
_LESS = "shorten the longest rows, end what else uses the GPU, or take a smaller model"


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, form: str) -> str:
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class Evaluation:
    """One model on the rows.

    Attributes:
        losses: summed negative log likelihood of each row's counted tokens, nats.
        answers: greedy answers; empty if the rows have no `answer`.
        scores: of each answer, 1 for right and 0 for wrong; some scorers give shares.
    """

    name: str
    losses: list[float]
    tokens: list[int]
    answers: list[str]
    scores: list[float]
    scorer: str = "exact"

    @property
    def loss(self) -> Interval:
        """Nats a token; the interval is a bootstrap over rows."""
        return _bootstrap(np.array(self.losses), np.array(self.tokens))

    @property
    def perplexity(self) -> Interval:
        loss = self.loss
        return Interval(math.exp(loss.value), math.exp(loss.low), math.exp(loss.high))

    @property
    def score(self) -> Interval | None:
        """Share of right answers with Wilson's interval, or the mean of scores between, with a bootstrap's."""
        if not self.scores:
            return None
        if set(self.scores) <= {0.0, 1.0}:
            return wilson(int(sum(self.scores)), len(self.scores))
        return _bootstrap(np.array(self.scores), np.ones(len(self.scores)))


def evaluate(
    model: str | Path,
    data: str,
    *,
    other: str | Path | None = None,
    base: str | None = None,
    quantize: str | None = None,
    max_rows: int | None = None,
    scorer: str = "exact",
    console: Console | None = None,
) -> list[Evaluation]:
    """Scores one model or two on the same held-out rows and prints a table.

    Args:
        model: a folder with an adapter, whose base is loaded as it was in training (in 4 bit where no record says how), or
            whatever `load_base` takes, loaded as it is.
        data: rows as the recipe takes them, or `prompt` with `answer`. The loss is on the assistant's tokens. Rows with an
            `answer` are also answered, greedily, and the answer is scored.
        other: a second model.
        base: of the adapters, instead of the one that they name.
        quantize: "nf4" or "none", of the adapters' base, instead of what they were trained on.
        max_rows: the first so many rows.
        scorer: "exact" is equal to the row's `answer`, white space at the ends aside; "last-number" compares the number
            after "####" or else the last one; "choice" the first word, or the first after "answer is" or "answer:";
            "contains" looks for the answer as whole words; "reasoning-gym" asks the data set that the row's `metadata` names.
        console: where the table is printed; None for nowhere.

    Raises:
        InputError: a model or the rows cannot be used.
    """
    find_scorer(scorer)
    console = console or Console(quiet=True)
    with quiet():
        found = [
            _score(str(name), data, (base, quantize), max_rows, scorer, console)
            for name in (model, other)
            if name is not None
        ]
    if len(found) == 2 and found[0].tokens != found[1].tokens:
        console.print(
            "note: the two models count the rows' tokens differently, so their losses a token do not compare",
            highlight=False,
        )
    console.print(table(found))
    return found


def difference(first: Evaluation, second: Evaluation) -> dict[str, Interval]:
    """Second minus first, each row compared with itself; an interval without zero is a difference at the 95 % level."""
    found = {}
    if first.tokens == second.tokens:
        found["loss"] = _bootstrap(np.array(second.losses) - np.array(first.losses), np.array(first.tokens))
    if first.scores and second.scores:
        found["score"] = _bootstrap(np.array(second.scores) - np.array(first.scores), np.ones(len(first.scores)))
    return found


def wilson(right: int, count: int) -> Interval:
    """Wilson's score interval of a share."""
    z = 1.959964
    share, spread = right / count, z * math.sqrt(right / count * (1 - right / count) / count + z * z / (4 * count**2))
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    return Interval(share, max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0))


def table(found: list[Evaluation]) -> Table:
    """The figures of each model and, for two, their difference row by row."""
    title = f"{len(found[0].tokens)} rows, {sum(found[0].tokens)} tokens; 95 % intervals"
    drawn = Table(title=title, title_justify="left")
    for name in ("", *(evaluation.name for evaluation in found)):
        drawn.add_column(name, overflow="fold")
    paired = difference(*found) if len(found) == 2 else {}
    if paired:
        drawn.add_column("second - first")

    def add_row(name: str, cells: list[str], key: str = "", form: str = "") -> None:
        last = [paired[key].text(form) if key in paired else ""] if paired else []
        drawn.add_row(name, *cells, *last)

    add_row("loss, nats a token", [e.loss.text(".4f") for e in found], "loss", "+.4f")
    add_row("perplexity", [e.perplexity.text(".3f") for e in found])
    if all(e.scores for e in found):
        name = "exact match" if found[0].scorer == "exact" else f"right, by {found[0].scorer}"
        add_row(name, [e.score.text(".1%") for e in found if e.score], "score", "+.1%")
    return drawn


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """For a file: the figures, and each row's answer."""
    score = evaluation.score
    return {
        "model": evaluation.name,
        "rows": len(evaluation.tokens),
        "tokens": sum(evaluation.tokens),
        "loss": asdict(evaluation.loss),
        "perplexity": asdict(evaluation.perplexity),
        "scorer": evaluation.scorer,
        "score": None if score is None else asdict(score),
        "scores": evaluation.scores,
        "answers": evaluation.answers,
    }


def _score(
    name: str,
    data: str,
    base: tuple[str | None, str | None],
    max_rows: int | None,
    scorer: str,
    console: Console,
) -> Evaluation:
    model, tokenizer = _load(name, *base, console)
    rows = load_rows(data, tokenizer, max_rows=max_rows)
    for notice in rows.notices:
        console.print(f"note: {notice}", highlight=False)
    losses = [0.0] * len(rows.rows)
    with explaining_memory("computing the loss", _LESS):
        for index, logits in logits_of_rows(model, rows.rows):
            losses[index] = F.cross_entropy(logits, torch.tensor(rows.rows[index]["targets"]), reduction="sum").item()
    tokens = [len(row["positions"]) for row in rows.rows]
    rule = find_scorer(scorer)
    scoring = [rule.prepare(right, row) for right, row in zip(rows.answers, rows.extra, strict=True)]
    answers: list[str] = []
    if rows.answers:
        console.print(f"Answering {len(rows.answers)} prompts ...", highlight=False)
        with explaining_memory("answering", _LESS):
            answers = greedy_answers(model, tokenizer, rows, _MAX_ANSWER if rule.reads_on else None)
    scores = [score(said) for score, said in zip(scoring, answers, strict=True)]
    # Another model may be about to be loaded.
    del model
    clear_device_cache(garbage_collection=True)
    return Evaluation(Path(name).name, losses, tokens, answers, scores, scorer)


def greedy_answers(model: Any, tokenizer: Any, rows: Rows, limit: int | None = None) -> list[str]:
    """What the model says after each row's prompt.

    Args:
        limit: tokens of an answer; None cuts a little after where the longest right one ends.
    """
    limit = limit or 8 + max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rows.answers)
    prompts = [row["ids"][: row["positions"][0] + 1] for row in rows.rows]
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt").to(
            model.device
        )
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=min(limit, _MAX_ANSWER), do_sample=False)
        said = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, said, strict=True):
            texts[index] = text.strip()
    return texts


def _load(name: str, base: str | None, quantize: str | None, console: Console) -> tuple[Any, Any]:
    """Model and tokenizer: an adapter on its base as in training, or a whole model as it is stored."""
    if not (adapter_folder(name) / "adapter_config.json").is_file():
        device = compute_device()
        where = describe_device(device, compute_dtype(device))
        console.print(f"Loading {name} on {where} ...", highlight=False, soft_wrap=True)
        return load_base(name, quantize=None, device=device)
    trained = load_trained(read_adapter(name, "eval"), base, None, console, quantize=quantize, dtype=None)
    return trained.peft, trained.tokenizer


def _bootstrap(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """sum(sums) / sum(counts) and its percentile interval over resampled rows."""
    generator = np.random.default_rng(0)
    # How often each row is drawn, one resample at a time: all of them at once would be gigabytes for many rows.
    draws = (generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums))) for _ in range(_RESAMPLES))
    low, high = np.quantile([(draw @ sums) / (draw @ counts) for draw in draws], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))
