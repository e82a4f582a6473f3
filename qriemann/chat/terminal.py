"""The chat as a person sees it: a prompt, answers that appear while they are made, and commands that begin with a slash.

Where standard input is not a terminal there is no decoration and no conversation: a question in, an answer out, a line each.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qriemann.chat.session import Session
from qriemann.errors import InputError

_HELP = """\
/base [TEXT]       answer the last question, or TEXT, with the adapter and without, side by side
/system [TEXT]     begin anew with this system prompt, or show it
/reset             forget the conversation, keep the system prompt
/set [NAME VALUE]  change how answers are generated, or show it
/quit              end; so does Ctrl-D. Ctrl-C ends an answer"""


def chat(session: Session) -> None:
    """Asks and answers until the input ends."""
    if sys.stdin.isatty():
        _Terminal(session, Console()).run(_typed_lines())
    else:
        _Pipe(session).run(sys.stdin)


class _Pipe:
    """Writes a line to standard output for each question, newlines in it as \\n, and everything else to standard error.

    Each question stands for itself: an answer must not depend on where its line stands in a file.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self, lines: Iterable[str]) -> None:
        for note in self.session.notes:
            self.tell(note)
        for line in filter(None, map(str.strip, lines)):
            word, _, rest = line.partition(" ")
            if word in ("/quit", "/exit"):
                return
            try:
                self.answer(line) if not word.startswith("/") else self.obey(word, rest.strip())
            except InputError as error:
                self.tell(str(error))

    def obey(self, command: str, text: str) -> None:
        session = self.session
        match command:
            case "/base":
                if session.base is None:
                    raise InputError("a merged model has no adapter to switch off; chat with the adapter's folder")
                if not (text or session.said("user")):
                    raise InputError("there is no question to compare yet; write /base TEXT")
                self.compare(text)
            case "/help":
                self.tell(_HELP)
            case "/reset":
                session.reset()
                self.tell("the conversation is forgotten")
            case "/set":
                if text:
                    name, _, value = text.partition(" ")
                    session.settings.change(name, value.strip())
                self.tell("  ".join(f"{name} {value}" for name, value in session.settings))
            case "/system":
                if text:
                    session.reset(text)
                self.tell(f"system prompt: {(session.said('system') or ['none'])[0]}")
            case _:
                raise InputError(f"a command must be one of those that /help lists, got {command}")

    def answer(self, question: str) -> None:
        self.session.reset()
        self.print_line(self.session.ask(question, lambda piece: None)[0])

    def compare(self, question: str) -> None:
        pieces: list[str] = []
        self.session.ask_base(question or self.session.said("user")[-1], pieces.append)
        self.print_line("".join(pieces).strip())

    def tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def print_line(self, answer: str) -> None:
        print(answer.replace("\\", "\\\\").replace("\n", "\\n"), flush=True)


class _Terminal(_Pipe):
    """Streams to a terminal, and goes on with the conversation."""

    def __init__(self, session: Session, console: Console) -> None:
        super().__init__(session)
        self.console = console

    def run(self, lines: Iterable[str]) -> None:
        on = f" on {self.session.base}" if self.session.base else ""
        self.console.print(Panel(Text(f"{self.session.name}{on}\n/help lists the commands"), expand=False))
        super().run(lines)

    def answer(self, question: str) -> None:
        started = time.perf_counter()
        try:
            # Text: brackets in an answer are no markup.
            _, dropped = self.session.ask(
                question, lambda piece: self.console.print(Text(piece), end="", soft_wrap=True)
            )
        except KeyboardInterrupt:
            self.tell("\nstopped")
            return
        self.console.print()
        if dropped:
            self.tell(f"{dropped} old messages were dropped to make room")
        self.tell(f"{time.perf_counter() - started:.1f} s")

    def compare(self, question: str) -> None:
        if question:
            self.answer(question)
        asked, pieces = question or self.session.said("user")[-1], list[str]()
        try:
            with self.console.status("asking the base alone"):
                self.session.ask_base(asked, pieces.append)
        # What it has said by then is compared.
        except KeyboardInterrupt:
            self.tell("stopped")
        table = Table(title=Text(asked), title_justify="left", expand=True)
        for name in ("with the adapter", "the base alone"):
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(Text("".join(self.session.said("assistant")[-1:])), Text("".join(pieces).strip()))
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
