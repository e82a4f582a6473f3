"""The command line: `qriemann COMMAND ...`; every command is a thin call of the library function of its name.

Exit status 0 for success, 2 for something the user can mend (one line says what), 130 for Ctrl-C; a bug keeps its
traceback. torch and TRL are imported when a command runs, so that `qriemann --help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from qriemann.errors import InputError


class _Parser(argparse.ArgumentParser):
    """Bad arguments in one line, as any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


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
    debug = "--debug" in words
    return reporting(lambda: _run([word for word in words if word != "--debug"]), debug=debug)


def _run(words: list[str]) -> int:
    parser = _parser()
    # `train` and `check` hand `--key value` pairs on to the configuration; no other command takes what it does not know.
    known, pairs = parser.parse_known_args(words)
    if pairs and not known.takes_pairs:
        parser.error(f"{known.command} takes no argument {pairs[0]!r}")
    if known.takes_pairs:
        known.pairs = pairs
    return known.run(known) or 0


def reporting(run: Callable[[], int], *, debug: bool = False) -> int:
    """The exit status of `run`, its errors told in one line; with `debug` they keep their traceback."""
    try:
        return run()
    except SystemExit as end:  # argparse's --help
        return int(end.code or 0)
    except InputError as error:
        if debug:
            raise
        print(f"qriemann: {_one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if debug or not name or name == "qriemann":
            raise
        print(f"qriemann: {name} must be installed for this, got no such module; pip install {name}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qriemann: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qriemann",
        description="Fine-tunes chat models in 4 bit with an adapter on the manifold of fixed-rank matrices.",
        epilog="--debug after any command shows the traceback of an error.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for add in (_add_train,):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str, *, takes_pairs: bool = False
) -> argparse.ArgumentParser:
    """A subparser whose arguments go to `run`; with `takes_pairs`, `--key value` pairs that it does not know come along."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run, takes_pairs=takes_pairs)
    return parser


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", _train, "train an adapter as a YAML file says", takes_pairs=True)
    parser.add_argument("file", nargs="?", metavar="FILE.yaml", help="the settings; --key value overrides them")
    parser.add_argument("--help-keys", action="store_true", help="list the keys of this project; SFTConfig's are taken too")


def _train(arguments: argparse.Namespace) -> int:
    if arguments.help_keys:
        from qriemann.training.config import describe_options

        for name, default, text in describe_options():
            print(f"{name:28} {default:16} {text}")
        return 0
    if arguments.file is None:
        raise InputError("train must be followed by a YAML file, got none; see qriemann train --help")
    return run_training(arguments.file, arguments.pairs)


def run_training(path: str | None, pairs: Sequence[str]) -> int:
    """Trains as the YAML file and the `--key value` pairs say.

    Args:
        path: the YAML file; None for the command line alone.
        pairs: `--key value` pairs.

    Raises:
        InputError: for anything that the user can mend.
    """
    from qriemann.training.config import load_config
    from qriemann.training.run import train

    try:
        result = train(load_config(path, pairs))
    except KeyboardInterrupt:
        print("qriemann: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        raise
    # Closes the loggers and the process group, which nothing after this needs.
    result.trainer.end()
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
