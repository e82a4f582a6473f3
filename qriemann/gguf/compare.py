"""What llama.cpp makes of a file, held against the trained model.

Both get the same tokens, and their next-token distributions are compared: in free-running text a near tie flips the rest.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from qriemann.base.chat_template import render
from qriemann.errors import InputError
from qriemann.evaluation.proof import Recording
from qriemann.evaluation.reload import Differences, summarize
from qriemann.gguf import engine

ENGINE = "xllamacpp"
# Tokens of a position whose probabilities are compared one by one; the rest is one more. On the embedded model the rest has
# 0.4 % of the mass on average.
_TOP = 512
_ASKED, _ANSWER_TOKENS = 10, 64
# Whatever tokenizers are known to cut in different ways.
_HARD = (
    "  two  spaces 2026 3.14159 x=1;\n\n\n\ttab\r\nDON'T we'll I'd he's  \n   end ",
    "naïve Ünïcode 中文字符 日本語 한국어 العربية עברית 🙂👩‍👩‍👧 ½ ² €100 №5 a\u0301",
    'def f(x):\n    return {"a": [1, 22, 333, 4444]}  # done!!! ... https://x.org/?q=1&r=%20',
)


class Figures(Differences):
    """A file in llama.cpp against the recorded model.

    The divergence takes all tokens beyond the file's most likely 512 as one, which can only make it smaller.
    largest_difference: of the log-probability of one of these tokens, nats.
    """

    largest_difference: float


@dataclass(frozen=True)
class Seen:
    """What llama.cpp did with a file.

    Attributes:
        retold: a sentence for each conversation or text whose tokens are not those of the training; empty if there is none.
        ended: how many of the answers to the first `asked` rows ended by themselves within 64 tokens.
    """

    figures: Figures | None
    failure: str = ""
    retold: tuple[str, ...] = ()
    asked: int = 0
    ended: int = 0


def has_engine() -> bool:
    """Whether llama.cpp can be run here."""
    return importlib.util.find_spec(ENGINE) is not None


def run(
    model: Path, adapter: Path | None, recording: Recording, tokenizer: PreTrainedTokenizerBase, *, talk: bool = True
) -> Seen:
    """Loads the file, with an adapter to it or None, in a fresh process of llama.cpp and compares it."""
    said = _said(tokenizer) if talk else []
    request = {
        "model": str(model.resolve()),
        "lora": "" if adapter is None else str(adapter.resolve()),
        "context": 256 + max(map(len, (row["ids"] for row in recording.rows)), default=0) + 2 * _ANSWER_TOKENS,
        "threads": torch.get_num_threads(),
        "rows": recording.rows,
        "forced": _ids(tokenizer, "a")[0],
        "count": _TOP,
        "said": [one for one, _ in said],
        # As far as what the rows' first answers begin after.
        "asked": [row["ids"][: row["positions"][0] + 1] for row in recording.rows[: _ASKED * talk] if row["positions"]],
        "tokens": _ANSWER_TOKENS,
    }
    with tempfile.TemporaryDirectory(dir=recording.path.parent) as scratch:
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request), "utf-8")
        # -P: the script's own folder, which is inside this package, is not where the process looks for modules.
        command = [sys.executable, "-P", engine.__file__, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            return Seen(None, _reason(done))
        with np.load(path.with_name("values.npz")) as values:
            figures = _figures(recording, values["tokens"], values["values"], values["targets"])
        result = json.loads(path.with_name("result.json").read_text("utf-8"))
    retold = [
        f"llama.cpp makes other tokens of {(one if isinstance(one, str) else one[-1]['content'])[:40]!r}: "
        f"{_first_difference(right, found)}"
        for (one, right), found in zip(said, result["said"], strict=True)
        if right != found
    ]
    return Seen(figures, "", tuple(retold), len(result["endings"]), result["endings"].count("stop"))


def far(seen: Seen, bound: float) -> list[str]:
    """Why a file that rounds nothing is not the trained model, to `bound` nats a log-probability; empty if it is."""
    if seen.figures is None:
        return [seen.failure]
    found, reasons = seen.figures["largest_difference"], list(seen.retold[:2])
    # Written so that a NaN counts as far.
    if not found <= bound:
        reasons.insert(0, f"log-probabilities differ by up to {found:.1e} from the trained model's, above {bound:.0e}")
    return reasons


def _figures(recording: Recording, tokens: np.ndarray, values: np.ndarray, targets: np.ndarray) -> Figures:
    divergences, agreements, losses, recorded_losses, largest = [], [], [], [], 0.0
    start = 0
    with safe_open(recording.path, "pt") as file:
        for index, row in enumerate(recording.rows):
            stop = start + len(row["positions"])
            top = torch.from_numpy(tokens[start:stop])
            log_q = torch.from_numpy(values[start:stop]).double()
            whole = file.get_tensor(str(index)).double().log_softmax(-1)
            # Rows of embeddings that stand for no token are filled up in the file; llama.cpp gives all of them.
            log_p = whole.gather(-1, top)
            rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp_min(1e-12) for log in (log_p, log_q))
            each = (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
            divergences.append(each.clamp_min(0))
            agreements.append((whole.argmax(-1) == top[:, 0]).double())
            losses.append(-torch.from_numpy(targets[start:stop]).double())
            recorded_losses.append(-whole.gather(-1, torch.tensor(row["targets"])[:, None])[:, 0])
            largest = max(largest, (log_p - log_q).abs().max().item())
            start = stop
    return {**summarize(divergences, agreements, losses, recorded_losses), "largest_difference": largest}


def _said(tokenizer: PreTrainedTokenizerBase) -> list[tuple[Any, list[int]]]:
    """Hard texts, ten questions and two longer conversations where the template takes them, each with its tokens."""
    lines = resources.files("qriemann.evaluation").joinpath("prompts.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:_ASKED]]
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    turns = [*asked[0], {"role": "assistant", "content": rows[0]["completion"]}, *asked[1]]
    found: list[tuple[Any, list[int]]] = [(text, _ids(tokenizer, text)) for text in _HARD]
    for messages in (*asked, turns, [{"role": "system", "content": "Be brief."}, *turns]):
        # Many a template refuses a system prompt.
        with contextlib.suppress(InputError):
            found.append((messages, _ids(tokenizer, render(tokenizer, messages))))
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_difference(right: list[int], found: list[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(right, found, strict=False)) if a != b), min(len(right), len(found)))
    return f"{found[place : place + 3]} at token {place}, where training had {right[place : place + 3]}"


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line in which llama.cpp says why it ended."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [line.rpartition(" E ")[2] for line in lines if " E " in line] or lines[-1:] or ["no message"]
    return f"llama.cpp does not take it (status {done.returncode}): {' '.join(said[0].split())}"
