"""The chat as a person sees it: a prompt, answers that appear while they are made, and commands that begin with a slash.

Where standard input is not a terminal there is no decoration and no conversation: a question in, an answer out, a line each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qriemann.chat.session import Session
from qriemann.errors import InputError

_HELP = (
    ("/base [TEXT]", "answer the last question, or TEXT, with the adapter and without, side by side"),
    ("/system [TEXT]", "begin anew with this system prompt, or show it"),
    ("/reset", "forget the conversation, keep the system prompt"),
    ("/set [NAME VALUE]", "change how answers are generated, or show it"),
    ("/quit", "end; so does Ctrl-D. Ctrl-C ends an answer"),
)


def chat(session: Session, console: Console | None = None) -> None:
    """Asks and answers until the input ends."""
    if sys.stdin.isatty():
        _Terminal(session, console or Console()).run(_typed_lines())
    else:
        _Pipe(session).run(sys.stdin)


class _Conversation:
    """What both have in common: a line is a question or a command."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._commands: dict[str, Callable[[str], None]] = {
            "/base": self.base,
            "/help": self.help,
            "/reset": self.reset,
            "/set": self.set,
            "/system": self.system,
        }

    def run(self, lines: Iterator[str]) -> None:
        for line in lines:
            if not line.strip():
                continue
            word, _, rest = line.strip().partition(" ")
            if word in ("/quit", "/exit"):
                return
            try:
                if not word.startswith("/"):
                    self.ask(line.strip())
                elif word in self._commands:
                    self._commands[word](rest.strip())
                else:
                    raise InputError(
                        f"a command must be one of {', '.join(self._commands)}, /quit, got {word}; see /help"
                    )
            except InputError as error:
                self.tell(str(error))

    def ask(self, question: str) -> None:
        raise NotImplementedError

    def base(self, question: str) -> None:
        raise NotImplementedError

    def help(self, _: str) -> None:
        raise NotImplementedError

    def tell(self, text: str) -> None:
        raise NotImplementedError

    def reset(self, _: str) -> None:
        self.session.reset()
        self.tell("the conversation is forgotten")

    def system(self, text: str) -> None:
        if text:
            self.session.set_system(text)
        history = self.session.history
        prompt = history[0]["content"] if history and history[0]["role"] == "system" else "none"
        self.tell(f"system prompt: {prompt}")

    def set(self, words: str) -> None:
        name, _, value = words.partition(" ")
        if name:
            self.session.settings.change(name, value.strip())
        self.tell("  ".join(f"{key} {value}" for key, value in asdict(self.session.settings).items()))

    def question_for_base(self, given: str) -> str:
        if not self.session.has_adapter:
            raise InputError(
                "/base must have an adapter to switch off, got a merged model; chat with the adapter's folder"
            )
        question = given or self.session.last_question
        if question is None:
            raise InputError("/base must have a question, got none before it; write /base TEXT")
        return question


class _Pipe(_Conversation):
    """A line of standard output for each question, newlines in it as \\n; everything else goes to standard error.

    Each question stands for itself: an answer must not depend on where its line stands in a file.
    """

    def run(self, lines: Iterator[str]) -> None:
        for note in self.session.notes:
            self.tell(note)
        super().run(lines)

    def ask(self, question: str) -> None:
        self.session.reset()
        self._print(self.session.ask(question, lambda piece: None)[0])

    def base(self, question: str) -> None:
        pieces: list[str] = []
        self.session.ask_base(self.question_for_base(question), pieces.append)
        self._print("".join(pieces).strip())

    def help(self, _: str) -> None:
        for command, text in _HELP:
            self.tell(f"{command:20} {text}")

    def tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _print(self, answer: str) -> None:
        print(answer.replace("\\", "\\\\").replace("\n", "\\n"), flush=True)


class _Terminal(_Conversation):
    """Streams to a terminal."""

    def __init__(self, session: Session, console: Console) -> None:
        super().__init__(session)
        self.console = console

    def run(self, lines: Iterator[str]) -> None:
        on = f" on {self.session.base}" if self.session.base else ""
        self.console.print(Panel(Text(f"{self.session.name}{on}\n/help lists the commands"), expand=False))
        for note in self.session.notes:
            self.tell(note)
        super().run(lines)

    def ask(self, question: str) -> None:
        started = time.perf_counter()
        try:
            # Text: brackets in an answer are no markup.
            _, dropped = self.session.ask(
                question, lambda piece: self.console.print(Text(piece), end="", soft_wrap=True)
            )
        except KeyboardInterrupt:
            self.console.print()
            self.tell("stopped")
            return
        self.console.print()
        if dropped:
            self.tell(f"{dropped} old messages were dropped to make room")
        self.tell(f"{time.perf_counter() - started:.1f} s")

    def base(self, question: str) -> None:
        asked = self.question_for_base(question)
        if question:
            self.ask(question)
        said: list[str] = []
        try:
            with self.console.status("asking the base alone"):
                self.session.ask_base(asked, said.append)
        # What it has said by then is compared.
        except KeyboardInterrupt:
            self.tell("stopped")
        answers = (message["content"] for message in reversed(self.session.history) if message["role"] == "assistant")
        table = Table(title=Text(asked), title_justify="left", expand=True)
        table.add_column("with the adapter", ratio=1, overflow="fold")
        table.add_column("the base alone", ratio=1, overflow="fold")
        table.add_row(Text(next(answers, "")), Text("".join(said).strip()))
        self.console.print(table)

    def help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command, text in _HELP:
            table.add_row(Text(command, style="bold"), Text(text))
        self.console.print(table)

    def tell(self, text: str) -> None:
        self.console.print(Text(text, style="dim"), soft_wrap=True)


def _typed_lines() -> Iterator[str]:
    """What is typed, line by line, with a history on the arrow keys; Ctrl-C clears the line, Ctrl-D ends."""
    with suppress(ImportError):  # Windows
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
