"""The former place of `qriemann.upstream.quiet`; goes with its last two callers."""

from contextlib import AbstractContextManager

from rich.console import Console

from qriemann.upstream import quiet


def no_bars_without_terminal(console: Console) -> AbstractContextManager[None]:
    """Hides upstream's bars where the console is no terminal."""
    return quiet(bars=console.is_terminal)
