"""Fine-tunes a chat model on a dataset of conversations: `python recipes/sft_chat.py --config recipes/sft_chat.yaml`.

The same function as `qriemann train FILE.yaml`. Any key of the file can be overridden: `--learning_rate 0.005`.
"""

import sys

from qriemann.cli import run_training
from qriemann.reporting import reporting
from qriemann.errors import InputError


def main(arguments: list[str]) -> int:
    """The exit status of the run: 0, or 2 for something in the settings to mend."""
    return reporting(lambda: _train(arguments))


def _train(arguments: list[str]) -> int:
    if "--config" not in arguments:
        return run_training(None, arguments)
    position = arguments.index("--config")
    path = arguments[position + 1 : position + 2]
    if not path:
        raise InputError("--config must be followed by a YAML file, got none")
    return run_training(path[0], arguments[:position] + arguments[position + 2 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
