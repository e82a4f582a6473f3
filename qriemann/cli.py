"""The command line: `qriemann train FILE.yaml [--key value ...]`.

Exit status 0 for a finished run, 2 for something the user can mend (one line says what), 130 for Ctrl-C; a bug keeps its
traceback. torch and TRL are imported when a command runs, so that `qriemann --help` answers at once.
"""

import sys
from collections.abc import Sequence

from qriemann.errors import InputError

_USAGE = """usage: qriemann train FILE.yaml [--key value ...] [--debug]

Fine-tunes a chat model in 4 bit with an adapter on the manifold of fixed-rank matrices.

FILE.yaml     the settings, one `key: value` a line; --key value overrides them
--debug       show the traceback of an error
--help-keys   list the keys of this project; those of trl.SFTConfig are accepted as well
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    command, *rest = words
    if command == "--version":
        import qriemann

        print(qriemann.__version__)
        return 0
    if command != "train":
        print(f"qriemann: the command must be train, got {command!r}; see qriemann --help", file=sys.stderr)
        return 2
    if "-h" in rest or "--help" in rest:
        print(_USAGE)
        return 0
    if "--help-keys" in rest:
        return _list_keys()
    if not rest or rest[0].startswith("-"):
        print("qriemann: train must be followed by a YAML file, got none; see qriemann train --help", file=sys.stderr)
        return 2
    return run_training(rest[0], rest[1:])


def run_training(path: str | None, arguments: Sequence[str]) -> int:
    """Trains as the YAML file and the `--key value` pairs say; prints one line on bad input.

    Args:
        path: the YAML file; None for the command line alone.
        arguments: `--key value` pairs, and `--debug` for tracebacks.

    Returns:
        The exit status.
    """
    pairs = [word for word in arguments if word != "--debug"]
    debug = len(pairs) < len(arguments)
    try:
        from qriemann.training.config import load_config
        from qriemann.training.run import train

        result = train(load_config(path, pairs))
        # Closes the loggers and the process group, which nothing after this needs.
        result.trainer.end()
    except InputError as error:
        if debug:
            raise
        print(f"qriemann: {_one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if debug or not name or name == "qriemann":
            raise
        print(
            f"qriemann: {name} must be installed for training, got no such module; pip install {name}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(
            "qriemann: interrupted; run the same command with --resume to go on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    return 0


def _list_keys() -> int:
    from qriemann.training.config import describe_options

    for name, default, text in describe_options():
        print(f"{name:28} {default:16} {text}")
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
