"""The command line's entry: it finds the command, runs it, and turns what happens into an exit status."""

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
    known, pairs = parser.parse_known_args(words)
    given = vars(known)
    name, run = given.pop("command"), given.pop("run")
    if given.pop("takes_pairs"):
        given["pairs"] = pairs
    elif pairs:
        parser.error(f"{name} takes no argument {pairs[0]!r}")
    return run(**given) or 0


def _parser() -> Parser:
    parser = Parser(
        prog="qriemann",
        description="Fine-tunes chat models in 4 bit with an adapter on the manifold of fixed-rank matrices.",
        epilog="--debug after any command shows the traceback of an error.",
        allow_abbrev=False,
    )
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for module in (training, release, doctor):
        module.COMMANDS.add_parsers(parsers)
    return parser
