"""The command line: `qriemann COMMAND ...`; every command is a thin call of one library function.

`entry.main` runs a command, `training` has train, plan and check, `release` the commands on what a training left. The exit
status is 0 for success, 2 for something that the user can mend (one line says what), 3 for a merge or an export whose proof
failed, 130 for Ctrl-C and 143 for SIGTERM; a bug keeps its traceback. torch is imported last, after all else was found good.
"""

from qriemann.cli.entry import main

__all__ = ["main"]
