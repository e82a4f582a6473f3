"""What every command's parser is made of."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from qriemann.errors import InputError


class Parser(argparse.ArgumentParser):
    """Bad arguments in one line, as any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str, *, takes_pairs: bool = False
) -> argparse.ArgumentParser:
    """A subparser whose arguments go to `run`; with `takes_pairs`, `--key value` pairs that it does not know come along."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run, takes_pairs=takes_pairs)
    return parser
