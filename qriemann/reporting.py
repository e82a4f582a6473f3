"""How a command ends: one line and an exit status for what the user can fix, a traceback for a bug, never a credential."""

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import TracebackType
from typing import Any

from qriemann.errors import InputError
from qriemann.upstream import quiet

# What the shell says of a program whose reader has gone: 128 + SIGPIPE.
_NO_READER = 141


class _WithoutCredentials:
    """A stream that hides credentials in everything printed: a server's answer may repeat the token.

    Where nobody reads it any more, as after `| head`, the program ends.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        from qriemann.folder.private import hide_credentials

        with self._ending():
            return self._stream.write(hide_credentials(text))

    def flush(self) -> None:
        with self._ending():
            self._stream.flush()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # Where the interpreter's own last flush succeeds.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise SystemExit(_NO_READER) from None

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def reporting(run: Callable[[], int], *, debug: bool = False) -> int:
    """The exit status of `run`. Its errors print one line; with `debug` they keep their traceback.

    Other libraries are quiet meanwhile, and a console shows a question mark for what its encoding cannot show.
    """
    sys.excepthook = _print_traceback
    for stream in (sys.stdout, sys.stderr):
        # Not there where a notebook or a test has put something of its own.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    out: Any = _WithoutCredentials(sys.stdout)
    err: Any = _WithoutCredentials(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err), quiet():
        return _exit_status(run, debug=debug)


def _exit_status(run: Callable[[], int], *, debug: bool) -> int:
    try:
        status = run()
        sys.stdout.flush()
        return status
    except SystemExit as end:  # argparse's --help
        return int(end.code or 0)
    except InputError as error:
        if debug:
            raise
        print(f"qriemann: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if debug or not name or name == "qriemann":
            raise
        print(f"qriemann: this needs the package {name}, which is not installed; pip install {name}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        # Late: it imports torch.
        from qriemann.device import describe_shortage, is_out_of_memory

        if debug or not is_out_of_memory(error):
            raise
        print(
            f"qriemann: out of memory: {describe_shortage(error)}; end what else uses it, or take a smaller batch or model",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:
        print("qriemann: interrupted", file=sys.stderr)
        return getattr(error, "exit_status", 130)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The interpreter's own report of an uncaught error, without credentials."""
    print("".join(traceback.format_exception(kind, error, trace)), end="", file=_WithoutCredentials(sys.stderr))
