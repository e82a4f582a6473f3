"""`report.html`: its numbers and curves against the files it was made from."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from qriemann import cli
from qriemann.release.report import write_report
from tests.release.folders import LOSSES, merged_folder, plain_adapter


class Page(HTMLParser):
    """Addresses that a browser would load, the drawn lines by id, and the text."""

    def __init__(self, page):
        super().__init__()
        self.loaded, self.lines, self.words, self._group = [], {}, [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.loaded += [values[key] for key in ("src", "href", "xlink:href", "data") if values.get(key)]
        if tag in ("script", "iframe", "link"):
            self.loaded.append(tag)
        if tag == "g":
            self._group = values.get("id")
        if tag == "path" and (self._group or "").startswith("curve-"):
            self.lines.setdefault(self._group, values["d"])

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def trained(finished_run, tmp_path_factory):
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("report") / "adapter")
    sample = {"question": "2 < 3 & so on?", "right": "yes", "before": "<b>no</b>", "after": "yes"}
    (folder / "quickstart.json").write_text(json.dumps({"samples": [sample]}))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(trained):
    return Page((trained / "report.html").read_text())


def points(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]


def test_the_loss_curve_is_the_metrics_up_to_the_scale_of_the_axes(page):
    drawn = points(page.lines["curve-loss"])
    assert len(drawn) == len(LOSSES)
    # The page's y axis points down, so heights are negative multiples of the losses.
    (_, top), (_, bottom) = drawn[0], drawn[-1]
    scale = (bottom - top) / (LOSSES[0] - LOSSES[-1])
    assert scale > 0
    for (_, y), loss in zip(drawn, LOSSES, strict=True):
        assert y == pytest.approx(top + scale * (LOSSES[0] - loss), abs=1e-3)
    steps = [x for x, _ in drawn]
    gaps = [b - a for a, b in pairwise(steps)]
    assert min(gaps) == pytest.approx(max(gaps), abs=1e-3)


def test_the_page_shows_every_curve_and_number_and_loads_nothing(page):
    assert set(page.lines) == {
        f"curve-{key}" for key in ("loss", "eval_loss", "learning_rate", "tokens_per_s", "peak_gib")
    }
    assert [address for address in page.loaded if not address.startswith("#")] == []
    text = " ".join(page.words)
    for shown in ("3.5 → 1.25", "finished", "f" * 64, "someone/base", "riemannion", "0.02"):
        assert shown in text, shown


def test_answers_are_shown_as_they_are_and_not_obeyed(page, trained):
    assert "<b>no</b>" in page.words
    assert "2 < 3 & so on?" in page.words
    assert "<b>no</b>" not in (trained / "report.html").read_text()


def test_an_adapter_that_is_not_finite_still_has_a_report(tmp_path, capsys):
    folder = plain_adapter(tmp_path / "adapter", torch.full((2, 8), torch.nan), torch.ones(8, 2))
    page = write_report(folder).read_text()
    assert "nan" in page
    assert "up_proj" in page
    assert cli.main(["inspect", str(folder)]) == 2
    assert "up_proj are not finite" in capsys.readouterr().err


def test_the_proof_of_a_merged_model_is_on_the_page(tmp_path):
    page = Page(write_report(merged_folder(tmp_path / "merged")).read_text())
    for shown in ("untrained base", "7.0e-01", "nf4-dequantized, fp32", "3.3e-09", "accepted"):
        assert shown in page.words, shown


def test_a_run_that_failed_has_a_report_of_what_it_left(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"status": "failed: RuntimeError"}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "failed: RuntimeError" in page.words
    assert "curve-loss" in page.lines


def test_a_folder_with_nothing_of_a_run_is_refused_in_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
