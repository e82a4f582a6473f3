"""The command line's entry: it finds the command, runs it, and turns what happens into an exit status."""

import argparse
import sys
from collections.abc import Sequence

from qriemann.cli import doctor, release, training
from qriemann.cli.parser import Parser
from qriemann.reporting import reporting


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        _parser().print_help()
        return 2
    if words[0] == "--version":
        import qriemann

        print(qriemann.__version__)
        return 0
    return reporting(lambda: _run([word for word in words if word != "--debug"]), debug="--debug" in words)


def _run(words: list[str]) -> int:
    parser = _parser()
    # `train`, `plan` and `check` hand `--key value` pairs on to the configuration; other commands refuse unknown arguments.
    known, pairs = parser.parse_known_args(words)
    if pairs and not known.takes_pairs:
        parser.error(f"{known.command} takes no argument {pairs[0]!r}")
    known.pairs = pairs
    return known.run(known) or 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qriemann",
        description="Fine-tunes chat models in 4 bit with an adapter on the manifold of fixed-rank matrices.",
        epilog="--debug after any command shows the traceback of an error.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    training.add_commands(commands)
    release.add_commands(commands)
    doctor.add_commands(commands)
    return parser
