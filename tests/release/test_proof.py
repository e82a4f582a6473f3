"""The proof's figures are the textbook's, and what is far from the trained model is rejected."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from peft import PeftModel
from rich.console import Console

import qriemann
from qriemann.cli import main
from qriemann.evaluation import proof
from qriemann.folder.contents import proof_rows
from tests.release.folders import PROOF


def test_the_report_compares_every_base_with_the_untrained_one_and_prefers_the_nearest(merged):
    report = json.loads((merged.result.folder / "merge_report.json").read_text())
    kl = {one["into"]: one["mean_kl"] for one in report["merged"]}
    assert list(kl) == ["original", "nf4-dequantized", "nf4"]
    assert report["prefer"]["into"] == min(kl, key=kl.get) == "nf4-dequantized"
    untrained = report["untrained_base"]["mean_kl"]
    assert kl["nf4-dequantized"] < 1e-8 < kl["original"]
    card = (merged.result.folder / "nf4" / "README.md").read_text()
    assert "merged into its weights (nf4)" in card
    for text in (merged.shown, card):
        assert f"{kl['original']:.1e}" in text
        assert f"{untrained:.1e}" in text
        assert ("original is farther from the trained model" in text) == (kl["original"] > untrained)
        assert "prefer nf4-dequantized" in text


@pytest.mark.parametrize("width", [60, 80])
def test_every_figure_is_whole_in_a_narrow_terminal(width):
    console = Console(file=io.StringIO(), width=width)
    entry = {**PROOF["merged"][0], "into": "a-name-that-is-long-F16.gguf", "bytes": 16_083_000_000}
    content = {**PROOF, "merged": [entry]}
    console.print(proof.table(content))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    for row in proof_rows(content):
        for cell in row[1:-1]:
            assert all(word in shown for word in cell.split())


def test_the_divergence_and_the_loss_are_the_textbook_ones(base, adapter, rows, merged):
    """The untrained base against the trained model, over the answers' tokens, from the definitions."""
    quantized, tokenizer = qriemann.load_base(base)
    model = PeftModel.from_pretrained(quantized, adapter).eval()
    divergences, losses, same = [], [], []
    for line in map(json.loads, rows.read_text().splitlines()):
        prompt = tokenizer.apply_chat_template(line["prompt"], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(f"{prompt}{line['answer']}<|im_end|>")["input_ids"]])
        with torch.no_grad():
            p = model(ids).logits[0].double().softmax(-1)
            with model.disable_adapter():
                q = model(ids).logits[0].double().softmax(-1)
        for position in range(start - 1, ids.shape[1] - 1):
            divergences.append((p[position] * (p[position] / q[position]).log()).sum().item())
            losses.append(-math.log(q[position, ids[0, position + 1]]))
            same.append(p[position].argmax() == q[position].argmax())
    found = merged.result.report["untrained_base"]
    assert found["tokens"] == len(divergences)
    assert found["mean_kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert found["worst_kl"] == pytest.approx(max(divergences), rel=1e-4)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["top_agreement"] == pytest.approx(sum(same) / len(same))


def test_a_threshold_below_what_is_measured_rejects(base, adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), str(tmp_path / "out"), "--into", "original", "--max-kl", "1e-6"]) == 3
    assert "above 1e-06" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
