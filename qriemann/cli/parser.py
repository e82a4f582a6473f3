"""How a command is declared: name, line in `--help` and arguments stand above the function that takes the arguments."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from qriemann.errors import InputError

Argument = tuple[tuple[str, ...], dict[str, Any]]


class Parser(argparse.ArgumentParser):
    """Bad arguments in one line, as any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


class Commands:
    """The commands of one module, in the order of `qriemann --help`."""

    def __init__(self) -> None:
        self._declared: list[tuple[str, str, tuple[Argument, ...], dict[str, Any]]] = []

    def add(self, name: str, text: str, *arguments: Argument, takes_pairs: bool = False) -> Callable[[Any], Any]:
        """Declares the decorated function as a command; `takes_pairs` hands unknown `--key value` words on as `pairs`."""

        def declare(run: Callable[..., int | None]) -> Callable[..., int | None]:
            self._declared.append((name, text, arguments, {"run": run, "takes_pairs": takes_pairs}))
            return run

        return declare

    def add_parsers(self, parsers: Any) -> None:
        """Gives each command a parser of its own."""
        for name, text, arguments, defaults in self._declared:
            parser = parsers.add_parser(name, help=text, description=text, allow_abbrev=False)
            parser.set_defaults(**defaults)
            for names, options in arguments:
                parser.add_argument(*names, **options)


def arg(*names: str, **options: Any) -> Argument:
    """One argument, as `add_argument` of argparse takes it."""
    return names, options
