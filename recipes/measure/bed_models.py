"""The models of the beds and their tasks: what is trained is cheap, because frozen layers below it run once.

Tail: the embedded chat model in NF4. Its last layers, final norm and head are a causal language model of their own, whose
inputs are the states that the layers below compute once for every row. Toy: a small Llama, pretrained on four symbol
tasks, that learns another one.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qriemann.errors import InputError


class Row(NamedTuple):
    """Token ids, and where the answer starts; from there on every token is trained, the end token included."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Attributes:
        states: what enters the trained layers, (rows, length, width).
        places: of the trained tokens' predictions in the flattened states.
        targets: the trained tokens.
        row: of each trained token, its row in the batch.
    """

    states: Tensor
    places: Tensor
    targets: Tensor
    row: Tensor


class Bed:
    """The last layers of a causal language model on states that enter them.

    Args:
        model: a Llama-like model; changed in place into its tail.
        layers: how many of its decoder layers remain.

    Attributes:
        tail: the last layers, final norm and head, for `get_peft_model`; called with `inputs_embeds`.
    """

    def __init__(self, model: Any, layers: int) -> None:
        body = model.model
        below = len(body.layers) - layers
        self.tail, self._lower = model, copy.copy(body)
        self._lower._modules = {**body._modules, "layers": body.layers[:below], "norm": nn.Identity()}
        self._lower.config = copy.copy(body.config)
        self._lower.config.num_hidden_layers = below
        body.layers = body.layers[below:]
        model.config.num_hidden_layers = body.config.num_hidden_layers = layers
        self._rows: list[Row] = []
        self._cached: list[Tensor] = []

    @property
    def _device(self) -> torch.device:
        return self.tail.lm_head.weight.device

    @torch.no_grad()
    def keep(self, rows: Sequence[Row], cache: Path | None = None) -> None:
        """Makes `rows` those of the bed; computes the states that enter the tail, or reads them from `cache`."""
        self._rows, self._cached = list(rows), []
        if not len(self._lower.layers):
            return  # An embedding is looked up faster than it is stored.
        lengths = [len(row.ids) - 1 for row in rows]
        if cache is None or not cache.exists():
            found: dict[int, Tensor] = {}
            order = sorted(range(len(rows)), key=lengths.__getitem__)
            for chosen in (order[start : start + 32] for start in range(0, len(order), 32)):
                states = self._lower(
                    _padded([rows[i] for i in chosen]).to(self._device), use_cache=False
                ).last_hidden_state
                found |= {i: state[: lengths[i]].cpu() for i, state in zip(chosen, states, strict=True)}
            flat = torch.cat([found[i] for i in range(len(rows))])
            if cache is not None:
                cache.parent.mkdir(parents=True, exist_ok=True)
                torch.save(flat, cache.with_suffix(".part"))
                cache.with_suffix(".part").rename(cache)
        else:
            flat = torch.load(cache, weights_only=True, mmap=True)
        self._cached = list(flat.split(lengths))

    def batch(self, chosen: Sequence[int]) -> Batch:
        """The rows of these numbers."""
        rows = [self._rows[i] for i in chosen]
        device = self._device
        if self._cached:
            states = nn.utils.rnn.pad_sequence([self._cached[i] for i in chosen], batch_first=True)
        else:
            states = self._lower.embed_tokens(_padded(rows).to(device))
        length = states.shape[1]
        places = [b * length + at for b, row in enumerate(rows) for at in range(row.start - 1, len(row.ids) - 1)]
        targets = [token for row in rows for token in row.ids[row.start :]]
        owner = [b for b, row in enumerate(rows) for _ in row.ids[row.start :]]
        return Batch(states.to(device), *(torch.tensor(found, device=device) for found in (places, targets, owner)))

    def logits(self, batch: Batch) -> Tensor:
        """Of the trained tokens, float32; the head sees no other token."""
        states = self.tail.model(inputs_embeds=batch.states, use_cache=False).last_hidden_state
        return self.tail.lm_head(states.flatten(0, 1)[batch.places]).float()


def _padded(rows: Sequence[Row]) -> Tensor:
    """Their ids but the last of each, which predicts nothing."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row.ids[:-1]) for row in rows], batch_first=True)


# Each word is one token of the embedded model.
_WORDS = """
apple arm baby bag ball bank bed bee bell bird boat body bone book box boy bread bridge brother camera card cat chair
child church city clock cloud coat corn cup day dog door dream ear earth egg eye face farm father field fire fish floor
flower food foot forest friend fruit game girl glass gold grass hair hand hat head heart hill home horse house ice iron
"""


def _sum(random: random.Random) -> tuple[str, str]:
    terms = [random.randint(1, 99) for _ in range(random.choice((2, 3)))]
    signs = [random.choice("+-") for _ in terms[1:]]
    text = str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))
    total = terms[0] + sum(term if sign == "+" else -term for sign, term in zip(signs, terms[1:], strict=True))
    return f"{text} =", str(total)


def _words(random: random.Random) -> tuple[str, str]:
    chosen = random.sample(_WORDS.split(), random.choice((4, 5, 6)))
    return ", ".join(chosen), ", ".join(reversed(chosen))


CHAT_TASKS: dict[str, tuple[str, Callable[[random.Random], tuple[str, str]]]] = {
    "sums": ("Answer with a number.", _sum),
    "words": ("Reverse the list of words.", _words),
}

_LONGEST = 256

_SYMBOLS = 16
SYMBOL_TASKS: dict[str, Callable[[list[int]], list[int]]] = {
    "copy": lambda symbols: symbols,
    "reverse": lambda symbols: symbols[::-1],
    "sort": sorted,
    "next": lambda symbols: [(symbol + 1) % _SYMBOLS for symbol in symbols],
    # What the toy is adapted to, never seen in pretraining.
    "sort-shift": lambda symbols: [(symbol + 5) % _SYMBOLS for symbol in sorted(symbols)],
    "running-sum": lambda symbols: [sum(symbols[: i + 1]) % _SYMBOLS for i in range(len(symbols))],
}
_PRETRAINED = ("copy", "reverse", "sort", "next")
_SEPARATOR, _END = _SYMBOLS + len(SYMBOL_TASKS), _SYMBOLS + len(SYMBOL_TASKS) + 1


def chat_rows(task: str, count: int, tokenizer: Any) -> list[Row]:
    """The first `count` questions of a task and their answers in the chat template, always the same ones in the same order.

    Args:
        task: of CHAT_TASKS, or a JSON-lines file of conversations, of which those up to 256 tokens are taken.
        count: of rows.
        tokenizer: with a chat template.

    Raises:
        InputError: the file has fewer.
    """
    rows: list[Row] = []
    for *asked, (_, answer) in _conversations(task):
        turns = [{"role": role, "content": content} for role, content in asked]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        said = tokenizer(answer, add_special_tokens=False)["input_ids"]
        row = Row([*prompt, *said, tokenizer.eos_token_id], len(prompt))
        if len(row.ids) <= _LONGEST:
            rows.append(row)
        if len(rows) == count:
            return rows
    raise InputError(f"{task} must hold at least {count} rows of up to {_LONGEST} tokens, got {len(rows)}")


def _conversations(task: str) -> Iterator[list[tuple[str, str]]]:
    """The turns of each row, role and content, the answer last."""
    if task not in CHAT_TASKS:
        for line in Path(task).read_text(encoding="utf-8").strip().split("\n"):
            yield [(turn["role"], turn["content"]) for turn in json.loads(line)["messages"]]
        return
    (system, make), source, seen = CHAT_TASKS[task], random.Random(0), set()
    while True:
        question, answer = make(source)
        if question not in seen:
            seen.add(question)
            yield [("system", system), ("user", question), ("assistant", answer)]


def symbol_rows(tasks: Sequence[str], count: int, seed: int = 0) -> list[Row]:
    """`count` sequences of 6 to 10 symbols and what the task makes of them."""
    source, names = random.Random(seed), list(SYMBOL_TASKS)
    rows: dict[tuple[int, ...], Row] = {}
    while len(rows) < count:
        task, symbols = source.choice(tasks), [source.randrange(_SYMBOLS) for _ in range(source.randint(6, 10))]
        asked = [_SYMBOLS + names.index(task), *symbols, _SEPARATOR]
        rows[tuple(asked)] = Row([*asked, *SYMBOL_TASKS[task](symbols), _END], len(asked))
    return list(rows.values())


def toy(width: int, depth: int, *, steps: int = 3000, cache: Path | None = None) -> Any:
    """A small Llama pretrained on copy, reverse, sort and next; about three minutes at width 128 and depth 3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = cache and cache / f"toy-w{width}-d{depth}-s{steps}"
    if folder and (folder / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    config = LlamaConfig(
        vocab_size=_END + 1,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=max(width // 32, 1),
        num_key_value_heads=max(width // 32, 1),
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=_END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    bed, batch = Bed(model, depth), 64
    bed.keep(symbol_rows(_PRETRAINED, batch * steps, seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (1 - step / steps)
        chosen = bed.batch(range(step * batch, (step + 1) * batch))
        loss = F.cross_entropy(bed.logits(chosen), chosen.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"pretrained the toy of width {width} and depth {depth}: loss {loss.item():.4f}", flush=True)
    if folder:
        model.save_pretrained(folder)
    return model.eval()
