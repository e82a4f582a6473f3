"""Fine-tunes a chat model on a dataset of conversations: `python recipes/sft_chat.py --config recipes/sft_chat.yaml`.

Calls the same function as `qriemann train FILE.yaml`. Options override keys of the file: `--learning_rate 0.005`.
"""

import sys

from qriemann.cli.training import run_training
from qriemann.errors import InputError
from qriemann.reporting import reporting


def main(arguments: list[str]) -> int:
    """The exit status: 0, or 2 for bad settings."""
    return reporting(lambda: _train(arguments))


def _train(arguments: list[str]) -> int:
    if "--config" not in arguments:
        return run_training(None, arguments)
    position = arguments.index("--config")
    path = arguments[position + 1 : position + 2]
    if not path:
        raise InputError("--config needs a YAML file after it")
    return run_training(path[0], arguments[:position] + arguments[position + 2 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
