"""No credential leaves by the command line, whoever prints it: looked for in every byte that a fresh process writes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# One that is told by its form, and one by the environment alone.
BY_FORM, BY_NAME = "hf_" + "Ab1" * 12, "sesame-open-sesame"
START = f"""
import logging, sys, warnings
from qriemann import cli
from qriemann.reporting import reporting
from qriemann.errors import InputError
TOKENS = {[BY_FORM, BY_NAME]}

def echo(kind):
    try:
        raise ConnectionError(f"the server refused Authorization: Bearer {{TOKENS}}")
    except ConnectionError as error:
        raise kind(f"got {{TOKENS}}") from error

def say():
    print(*TOKENS)
    print(*TOKENS, file=sys.stderr)
    sys.stdout.writelines(TOKENS)
    logging.warning("%s", TOKENS)
    warnings.warn(f"{{TOKENS}}")
    return 0
"""


def output_of(code: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        env={**os.environ, "WANDB_API_KEY": BY_NAME},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("code", "status", "tracebacks"),
    [
        ("sys.exit(reporting(say))", 0, 0),
        ("sys.exit(reporting(lambda: echo(InputError)))", 2, 0),
        ("sys.exit(reporting(lambda: echo(InputError), debug=True))", 1, 2),
        ("sys.exit(reporting(lambda: echo(AttributeError)))", 1, 2),
        ("sys.exit(cli.main(['push', *TOKENS, *TOKENS]))", 2, 0),
        ("sys.exit(cli.main(['push', *TOKENS, TOKENS[0], '--debug']))", 1, 1),
    ],
    ids=["printed", "an error", "an error, debugged", "a bug", "an argument", "an argument, debugged"],
)
def test_no_credential_is_in_what_a_process_writes(code, status, tracebacks):
    returned, written = output_of(code)
    assert (returned, written.count("Traceback")) == (status, tracebacks)
    assert BY_FORM not in written
    assert BY_NAME not in written
    assert "<redacted>" in written


def test_a_command_whose_reader_has_gone_ends_without_a_word():
    code = "import sys\nfrom qriemann.reporting import reporting\n"
    # More than a pipe holds.
    code += "sys.exit(reporting(lambda: [print(n) for n in range(100_000)] and 0))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
