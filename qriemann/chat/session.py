"""A conversation with a model: what was said, how answers are generated, and the adapter switched off for comparison."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as hf_logging

from qriemann.adapters.saved import adapter_folder, read_adapter, saved_tokenizer
from qriemann.base.chat_template import render
from qriemann.base.load import load_base
from qriemann.checkpoints.fingerprints import other_base
from qriemann.errors import InputError
from qriemann.folder.contents import ModelFolder, read_folder

# C0 and C1 control characters but newline and tab: a model's output must not drive the terminal.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass
class Settings:
    """How answers are generated.

    Attributes:
        temperature: 0 takes the most likely token each time.
        seed: of the sampling; None draws another each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None

    def change(self, name: str, value: str) -> None:
        """Sets one of them from what a person wrote.

        Raises:
            InputError: an unknown name, or a value out of range.
        """
        rules: dict[str, tuple[type, Callable[[Any], bool], str]] = {
            "temperature": (float, lambda x: 0 <= x <= 10, "in [0, 10]"),
            "top_p": (float, lambda x: 0 < x <= 1, "in (0, 1]"),
            "top_k": (int, lambda x: x >= 0, "at least 0, 0 for no limit"),
            "repetition_penalty": (float, lambda x: 0 < x <= 10, "in (0, 10]"),
            "max_new_tokens": (int, lambda x: x >= 1, "at least 1"),
            "seed": (int, lambda x: 0 <= x < 2**63, "at least 0, or none"),
        }
        if name not in rules:
            raise InputError(f"a setting must be one of {', '.join(rules)}, got {name!r}; see /help")
        if name == "seed" and value.lower() == "none":
            self.seed = None
            return
        convert, holds, rule = rules[name]
        try:
            number = convert(value)
        except ValueError:
            number = None
        if number is None or not holds(number):
            raise InputError(f"{name} must be {rule}, got {value!r}; write /set {name} NUMBER")
        setattr(self, name, number)

    def generation_config(self, stored: GenerationConfig | None, pad_token_id: int | None) -> GenerationConfig:
        """The stop and pad tokens of the model's own configuration, with these settings."""
        sampling = self.temperature > 0
        return GenerationConfig(
            eos_token_id=None if stored is None else stored.eos_token_id,
            pad_token_id=pad_token_id,
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            do_sample=sampling,
            **({"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k} if sampling else {}),
        )


@dataclass
class Session:
    """A model and a conversation with it.

    Attributes:
        name: of the folder.
        history: messages so far, the system prompt first if there is one.
        notes: what a person should know before the first question.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    base: str | None = None
    settings: Settings = field(default_factory=Settings)
    history: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def last_question(self) -> str | None:
        return next((message["content"] for message in reversed(self.history) if message["role"] == "user"), None)

    def set_system(self, text: str) -> None:
        """Begins anew with this system prompt; an empty one is none."""
        self.history = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        """Forgets everything but the system prompt."""
        self.history = [message for message in self.history if message["role"] == "system"]

    def ask(self, question: str, on_text: Callable[[str], None]) -> tuple[str, int]:
        """Answers a question and remembers both; Ctrl-C ends the answer, and what was said so far is remembered.

        Args:
            question: of the user.
            on_text: takes each piece of the answer as it comes.

        Returns:
            The answer and how many old messages were dropped to make room.

        Raises:
            InputError: the question alone does not fit into the context.
            KeyboardInterrupt: as it came; the answer so far is in the history.
        """
        messages, dropped = self._that_fit([*self.history, {"role": "user", "content": question}])
        said: list[str] = []

        def take(piece: str) -> None:
            said.append(piece)
            on_text(piece)

        try:
            self._generate(messages, take)
        finally:
            answer = "".join(said).strip()
            if answer:
                self.history = [*messages, {"role": "assistant", "content": answer}]
        return answer, dropped

    def ask_base(self, question: str, on_text: Callable[[str], None]) -> None:
        """The answer of the base alone to a question in the same conversation; it is not remembered."""
        history = self.history
        asked = next(
            (i for i in reversed(range(len(history))) if history[i] == {"role": "user", "content": question}), None
        )
        before = history if asked is None else history[:asked]
        messages, _ = self._that_fit([*before, {"role": "user", "content": question}])
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            self._generate(messages, on_text)

    def _that_fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], int]:
        """The messages without the oldest turns, if they would not leave room for an answer."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        dropped = 0
        # A quarter of the context for the answer, if the settings ask for more than that.
        room = min(self.settings.max_new_tokens, (limit or 0) // 4)
        while limit and self._tokens(messages).shape[1] + room > limit:
            first = 1 if messages[0]["role"] == "system" else 0
            if len(messages) - first <= 1:
                raise InputError(
                    f"a question must fit into the context of {limit} tokens, got a longer one; shorten it"
                )
            # A turn at a time: templates want user and assistant to alternate.
            cut = 2 if messages[first]["role"] == "user" and len(messages) - first > 2 else 1
            messages, dropped = messages[:first] + messages[first + cut :], dropped + cut
        return messages, dropped

    def _tokens(self, messages: list[dict[str, str]]) -> torch.Tensor:
        if self.tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages)
            return self.tokenizer(text, return_tensors="pt")["input_ids"]
        return self.tokenizer(render(self.tokenizer, messages), add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]

    def _generate(self, messages: list[dict[str, str]], on_text: Callable[[str], None]) -> None:
        ids = self._tokens(messages).to(self.model.device)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        config = self.settings.generation_config(self.model.generation_config, self.tokenizer.pad_token_id)
        if limit:
            config.max_new_tokens = max(1, min(self.settings.max_new_tokens, limit - ids.shape[1]))
        config.eos_token_id = self._ends(config.eos_token_id)
        with torch.inference_mode(), _seeded(self.settings.seed):
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=_Pieces(self.tokenizer, on_text),
            )

    def _ends(self, stored: int | list[int] | None) -> list[int]:
        """The tokens that end an answer: the model's, and the one that the tokenizer was trained with."""
        ends = [] if stored is None else stored if isinstance(stored, list) else [stored]
        own = self.tokenizer.eos_token_id
        return ends if own is None or own in ends else [*ends, own]


def load_session(
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    quantize: str | None = None,
    system: str | None = None,
    device: str | None = None,
) -> Session:
    """A session with an adapter on its base, or with a merged model.

    Args:
        folder: of either.
        base: instead of the one that the adapter names; as `load_base` takes it.
        quantize: "nf4" or "none". None is what the adapter was trained on, NF4 if nothing says so, and for a merged model
            the format that it is stored in.
        system: the system prompt.
        device: as `load_base` takes it.

    Raises:
        InputError: neither is in the folder, or the base cannot be had.
    """
    found = read_folder(adapter_folder(folder))
    if found.kind == "run":
        raise InputError(
            f"the folder must hold an adapter or a merged model, got {found.path} with neither; finish the run"
        )
    with _quiet_loading():
        session = _load(found, folder, base, quantize, device)
    if session.tokenizer.chat_template is None:
        session.notes.append("the tokenizer has no chat template: what you write is continued as plain text")
    stored = session.model.generation_config
    if stored is not None and stored.do_sample:
        session.settings.temperature = float(stored.temperature or 1.0)
        session.settings.top_p = float(stored.top_p or 1.0)
        session.settings.top_k = int(stored.top_k or 0)
    session.set_system(system or "")
    return session


def _load(
    found: ModelFolder, named: str | os.PathLike[str], base: str | None, quantize: str | None, device: str | None
) -> Session:
    if found.kind == "model":
        if base is not None:
            raise InputError(f"base must be left out for a merged model, got {base!r}; {found.path} holds all weights")
        model, tokenizer = load_base(found.path, quantize="nf4" if quantize == "nf4" else None, device=device)
        return Session(model, tokenizer, found.path.resolve().name)
    name = base or found.base
    if not name:
        raise InputError(f"the adapter must name its base model, got none in {found.path}; name it with --base")
    adapter = read_adapter(named)
    stored = quantize or found.settings.get("quantize", "nf4")
    revision = None if base else found.config.get("revision")
    model, tokenizer = load_base(name, quantize=None if stored == "none" else "nf4", device=device, revision=revision)
    tokenizer = _own_tokenizer(found.path, tokenizer)
    other = other_base(found.path, model, name)
    session = Session(adapter.put_on(model, name), tokenizer, found.path.resolve().name, name)
    session.notes += [] if other is None else [other]
    return session


def _own_tokenizer(folder: Path, of_base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer = saved_tokenizer(folder)
    if tokenizer is None:
        return of_base
    if tokenizer.pad_token is None:
        tokenizer.pad_token = of_base.pad_token
    return tokenizer


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bars where nobody watches, and no warning of PEFT 0.21 that it reads what transformers 5.23 renamed."""
    hide = not sys.stderr.isatty() and hf_logging.is_progress_bar_enabled()
    if hide:
        hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning
            )
            yield
    finally:
        if hide:
            hf_logging.enable_progress_bar()


class _Pieces(BaseStreamer):
    """Hands on an answer as it grows, without anything that a terminal would obey.

    transformers' own TextStreamer waits for the end of a word, which code and some languages are slow to reach.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._tokens: list[int] | None = None
        self._handed_on = 0

    def put(self, value: torch.Tensor) -> None:
        # The prompt comes first.
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        # A character of several tokens is a replacement character until its last one is there.
        self._hand_on(self._text().rstrip("\ufffd"))

    def end(self) -> None:
        self._hand_on(self._text())

    def _text(self) -> str:
        # All of it each time: some tokenizers drop the space before a token that comes first.
        return str(self._tokenizer.decode(self._tokens or [], skip_special_tokens=True))

    def _hand_on(self, text: str) -> None:
        piece, self._handed_on = text[self._handed_on :].translate(_CONTROL), max(self._handed_on, len(text))
        if piece:
            self._on_text(piece)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers from the seed, and afterwards as if none had been drawn."""
    if seed is None:
        yield
        return
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
