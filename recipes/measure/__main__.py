"""Measures what a method costs and how well it trains: `python recipes/measure COMMAND`; README.md has an example of each.

step       times one optimizer step on all adapters of a model
train      trains the same base with qriemann and with stock TRL, PEFT and AdamW
beds       runs a plan of hundreds to thousands of steps on a bed where they are cheap
report     writes the table and the picture of the beds from their rows
on_a_card  proves on one GPU, in minutes, that what is right on a CPU is right there, and what it costs
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from qriemann.reporting import reporting

_MODULES = {
    "step": "bench_step",
    "train": "bench_train",
    "beds": "beds",
    "report": "report",
    "on_a_card": "on_a_card",
}


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 for success, 2 for bad input, 3 for a plan with runs left, 130 for an interrupted one."""
    command = arguments[0] if arguments else ""
    if command not in _MODULES:
        asked = command in ("-h", "--help")
        print(__doc__, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    module = importlib.import_module(_MODULES[command])
    parser = argparse.ArgumentParser(
        prog=f"measure {command}", description=(module.__doc__ or "").strip().partition("\n")[0]
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments[1:])
    return reporting(lambda: module.main(options), debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
