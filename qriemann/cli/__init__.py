"""The command line: `qriemann COMMAND ...`; every command is a thin call of one library function.

The exit status is 0 for success, 2 for what the user can fix (one line says what), 3 for a merge or an export whose proof
failed, 130 for Ctrl-C and 143 for SIGTERM; a bug keeps its traceback. torch is imported last.
"""

from qriemann.cli.entry import main

__all__ = ["main"]
