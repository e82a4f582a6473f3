"""The command in a real pseudo-terminal, and through a pipe."""

import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from qriemann import cli

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")

_ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100", "TERM": "xterm"}


class Terminal:
    """A person at a terminal: types, and reads until a pattern has appeared."""

    def __init__(self, *arguments):
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "qriemann.cli", *arguments]
        # A session of its own, so that Ctrl-C typed here reaches that process through its terminal.
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=_ENVIRONMENT,
            preexec_fn=_take_terminal,
            close_fds=True,
        )
        os.close(theirs)
        self._seen = ""

    def type(self, text):
        os.write(self._ours, text.encode())

    def read_until(self, pattern, seconds=90):
        """Everything up to and with the first match; what follows is left for the next call."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self._seen)):
            ready, _, _ = select.select([self._ours], [], [], max(0, end - time.monotonic()))
            try:
                data = os.read(self._ours, 4096) if ready else b""
            except OSError:  # the other end is closed
                data = b""
            if not data:
                raise AssertionError(f"{pattern!r} did not appear in {self._seen!r}")
            self._seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
        text, self._seen = self._seen[: match.end()], self._seen[match.end() :]
        return text

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def _take_terminal():
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # A test run in the background ignores Ctrl-C, and hands that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_chat_in_a_real_terminal(adapter_folder):
    terminal = Terminal("chat", str(adapter_folder), "--quantize", "none")
    try:
        terminal.read_until("/help lists the commands")
        terminal.read_until("> $")

        terminal.type("/set max_new_tokens 12\n")
        terminal.read_until(r"max_new_tokens 12.*\s+> $")
        terminal.type("hello\n")
        answer = re.search(r"hello\r\n(.+)\r\n\d+\.\d s", terminal.read_until(r"\d+\.\d s\s+> $"), re.DOTALL)[1]
        assert answer.strip()

        terminal.type("/base\n")
        table = terminal.read_until("┘|╯|└[─┴]+┘")
        assert "with the adapter" in table
        assert "the base alone" in table
        terminal.read_until("> $")

        # Ctrl-C in the middle of an answer ends the answer.
        terminal.type("/set max_new_tokens 560\n")
        terminal.read_until(r"max_new_tokens 560.*\s+> $")
        terminal.type("/reset\n")
        terminal.read_until(r"forgotten\s+> $")
        terminal.type("go on\n")
        terminal.read_until(r"go on\r\n.{8}")
        terminal.type("\x03")
        terminal.read_until(r"stopped\s+> $")
        assert terminal.process.poll() is None

        # Ctrl-C at the prompt drops the line. Not at once: Python's readline misses a signal between its prompt, or an echo,
        # and its wait for the next key, which no person is fast enough for.
        terminal.type("half a question")
        terminal.read_until("half a question")
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.read_until(r"> $")
        terminal.type("/system Be odd.\n")
        terminal.read_until(r"system prompt: Be odd\.\s+> $")
        terminal.type("/nonsense\n")
        terminal.read_until(r"a command must be one of.*\s+> $")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()


def piped(folder, text):
    command = [sys.executable, "-m", "qriemann.cli", "chat", str(folder), "--quantize", "none"]
    return subprocess.run(
        command, input=text, env=_ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


def test_through_a_pipe_every_question_has_one_line_and_no_other_question_matters(adapter_folder):
    done = piped(adapter_folder, "/set max_new_tokens 12\nhello\nsomething else\n\nhello\n/base\n/quit\nnever asked\n")
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 4
    assert answers[0] == answers[2]
    assert len({answers[0], answers[1], answers[3]}) == 3
    assert "max_new_tokens 12" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "Loading" not in done.stderr


def test_a_folder_that_is_neither_adapter_nor_model_is_one_line(tmp_path, capsys):
    assert cli.main(["chat", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
