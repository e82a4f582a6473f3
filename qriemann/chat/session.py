"""A conversation with a model: its history, how answers are generated, and the base's answer for comparison."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated

import torch
from peft import PeftModel
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qriemann.adapters.attach import load_base
from qriemann.adapters.saved import adapter_folder, read_adapter
from qriemann.base.chat_template import end_tokens, render
from qriemann.device import describe_device, explaining_memory
from qriemann.errors import InputError
from qriemann.evaluation.trained import load_trained
from qriemann.folder.contents import read_folder
from qriemann.upstream import quiet

# C0 and C1 control characters but newline and tab: a model's output must not drive the terminal.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class AnswerSettings(BaseModel, validate_assignment=True):
    """How answers are generated.

    Attributes:
        temperature: 0 takes the most likely token each time.
        top_k: 0 for no limit.
        seed: of the sampling; None draws another each time.
    """

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    max_new_tokens: PositiveInt = 512
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    def change(self, name: str, value: str) -> None:
        """Sets one of them from what a person wrote."""
        names = type(self).model_fields
        if name not in names:
            raise InputError(f"a setting must be one of {', '.join(names)}, got {name!r}")
        try:
            setattr(self, name, None if (name, value.lower()) == ("seed", "none") else value)
        except ValidationError as error:
            raise InputError(f"{name}: {error.errors()[0]['msg']}, got {value!r}") from None


@dataclass
class Session:
    """A model and a conversation with it."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    base: str | None = None
    settings: AnswerSettings = field(default_factory=AnswerSettings)
    history: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def said(self, role: str) -> list[str]:
        """What "system", "user" or "assistant" has said so far."""
        return [message["content"] for message in self.history if message["role"] == role]

    def reset(self, system: str | None = None) -> None:
        """Forgets everything but the system prompt, and takes another one if it is given; an empty one is none."""
        prompts = self.said("system") if system is None else [system] if system else []
        self.history = [{"role": "system", "content": prompt} for prompt in prompts]

    def ask(self, question: str, on_text: Callable[[str], None]) -> tuple[str, int]:
        """Answers a question and remembers both; Ctrl-C ends the answer, and what was said so far is remembered.

        Returns:
            The answer, whose pieces `on_text` gets as they come, and how many old messages were dropped to make room.

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
        """Has the base alone answer a question in the same conversation; the answer is not remembered."""
        message = {"role": "user", "content": question}
        # A question that was asked already is answered where it was asked last.
        asked = [index for index, old in enumerate(self.history) if old == message]
        messages, _ = self._that_fit([*self.history[: asked[-1] if asked else None], message])
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            self._generate(messages, on_text)

    def _that_fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], int]:
        """The messages without the oldest turns, if they would not leave room for an answer, and how many went."""
        limit, dropped = self._limit(), 0
        # A quarter of the context for the answer, if the settings ask for more than that.
        room = min(self.settings.max_new_tokens, (limit or 0) // 4)
        while limit and len(prompt_tokens(self.tokenizer, messages)) + room > limit:
            first = 1 if messages[0]["role"] == "system" else 0
            if len(messages) - first <= 1:
                raise InputError(f"the question is longer than the context of {limit} tokens; shorten it")
            # A turn at a time: templates want user and assistant to alternate.
            cut = 2 if messages[first]["role"] == "user" and len(messages) - first > 2 else 1
            messages, dropped = messages[:first] + messages[first + cut :], dropped + cut
        return messages, dropped

    def _limit(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    def _generate(self, messages: list[dict[str, str]], on_text: Callable[[str], None]) -> None:
        ids = torch.tensor([prompt_tokens(self.tokenizer, messages)], device=self.model.device)
        chosen, limit = self.settings, self._limit()
        sampling = chosen.model_dump(include={"temperature", "top_p", "top_k"}) if chosen.temperature > 0 else {}
        config = GenerationConfig(
            eos_token_id=end_tokens(self.tokenizer, self.model),
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=min(chosen.max_new_tokens, limit - ids.shape[1]) if limit else chosen.max_new_tokens,
            repetition_penalty=chosen.repetition_penalty,
            do_sample=chosen.temperature > 0,
            **sampling,
        )
        if chosen.seed is not None:
            torch.manual_seed(chosen.seed)
        with (
            explaining_memory("answering", "/reset forgets the conversation, /set max_new_tokens N shortens answers"),
            torch.inference_mode(),
        ):
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=_Pieces(self.tokenizer, on_text),
            )


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """What the model is sent of a conversation, up to where its answer begins."""
    templated = tokenizer.chat_template is not None
    text = render(tokenizer, messages) if templated else "\n".join(message["content"] for message in messages)
    return tokenizer(text, add_special_tokens=not templated)["input_ids"]


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
        base: instead of the one that the adapter names; as `load_base` takes it.
        quantize: "nf4" or "none". None is what the adapter was trained on, NF4 if nothing says so, and for a merged model
            the format that it is stored in.
    """
    found = read_folder(adapter_folder(folder))
    label = found.path.resolve().name
    if found.kind == "run":
        raise InputError(f"{found.path} holds a run that has saved no adapter yet; finish the run")
    # Bars would stand between the answers of a pipe.
    with quiet():
        if found.kind != "model":
            saved, console = read_adapter(folder, "chat"), Console(quiet=True)
            on = load_trained(saved, base, None, console, quantize=quantize, dtype=None, device=device)
            session = Session(on.peft, on.tokenizer, label, on.base, notes=on.notes)
        elif base is not None:
            raise InputError(f"{found.path} is a whole model, which needs no base; leave --base {base} out")
        else:
            session = Session(
                *load_base(found.path, quantize="nf4" if quantize == "nf4" else None, device=device), label
            )
    session.notes.append(f"computing on {describe_device(session.model.device, session.model.dtype)}")
    if session.tokenizer.chat_template is None:
        session.notes.append("the tokenizer has no chat template: what you write is continued as plain text")
    stored = session.model.generation_config
    if stored is not None and stored.do_sample:
        session.settings = AnswerSettings(
            temperature=stored.temperature or 1.0, top_p=stored.top_p or 1.0, top_k=stored.top_k or 0
        )
    session.reset(system)
    return session


class _Pieces(BaseStreamer):
    """Streams an answer as it grows, without control characters.

    transformers' own TextStreamer waits for the end of a word, and drops the space before a line's first token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._tokens: list[int] | None = None
        self._handed_on = 0

    def put(self, value: torch.Tensor) -> None:
        # The prompt comes first.
        self._tokens = [] if self._tokens is None else self._tokens + value.flatten().tolist()
        self._hand_on(last=False)

    def end(self) -> None:
        self._hand_on(last=True)

    def _hand_on(self, *, last: bool) -> None:
        text = str(self._tokenizer.decode(self._tokens or [], skip_special_tokens=True))
        # A character of several tokens is a replacement character until its last one is there.
        text = text if last else text.rstrip("\ufffd")
        piece, self._handed_on = text[self._handed_on :].translate(_CONTROL), max(self._handed_on, len(text))
        if piece:
            self._on_text(piece)
