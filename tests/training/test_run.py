"""A whole run through a stock SFTTrainer, its records, and what the command line says when it cannot start."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from qriemann.data.sources import Source
from qriemann.data.tokenized import tokenize_rows
from tests.recipe_fixtures import chat_rows, run_cli, train_on


@pytest.fixture
def settings(settings):
    return {
        **settings,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "display": "plain",
        "hub_token": "hf_sesame",
    }


def test_plain_trl_builds_the_same_labels_for_prompt_and_completion(model_folder, tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt": f"say {n}: ", "completion": f"{n}"} for n in range(3)])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        processing_class=tokenizer,
        args=SFTConfig(output_dir=str(tmp_path), bf16=False, activation_checkpointing=False, report_to="none"),
        train_dataset=rows,
    )
    ours = tokenize_rows(Source(rows, "rows"), None, tokenizer).train
    assert ours["input_ids"][:] == trainer.train_dataset["input_ids"][:]
    assert ours["labels"][:] == trainer.train_dataset["labels"][:]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_leaves_its_adapter_and_records_that_agree(tmp_path, settings, quantize, capsys):
    assert run_cli(tmp_path, settings, "--quantize", quantize, "--eval_size", "4") == 0
    out = tmp_path / "out"
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["result"]["steps"] == 4
    assert run["result"]["eval_loss"] < run["result"]["eval_loss_before"]
    assert run["result"]["orthonormality_drift"] < 1e-5
    assert run["data"]["held_out_rows"] == 4
    assert "sesame" not in (out / "run.json").read_text()
    rows = json.loads((out / "trained_rows.json").read_text())
    assert rows["rows"] == {"all": 24, "training": 20, "held out": 4}
    assert {"it is 0<|im_end|>", "it is 23<|im_end|>"} & {p["text"] for row in rows["sample"] for p in row["pieces"]}
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics if "loss" in record] == [1, 2, 3, 4]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "step 4/4" in printed
    assert "4 of 24 rows" in printed


def test_a_resumed_run_refuses_other_rows(tmp_path, settings, write_rows, capsys):
    assert run_cli(tmp_path, settings) == 0
    other = {**settings, "dataset_name": str(write_rows(chat_rows(23), "other.jsonl"))}
    before = snapshot(tmp_path / "out")
    assert run_cli(tmp_path, other, "--resume") == 2
    assert "rows that the run started with" in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == before


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_a_run_is_kept_unless_overwriting_is_asked_for(tmp_path, settings, capsys):
    out = tmp_path / "out"
    assert run_cli(tmp_path, settings, "--max_steps", "2") == 0
    before = snapshot(out)
    capsys.readouterr()
    assert run_cli(tmp_path, settings) == 2
    error = capsys.readouterr().err
    assert "--resume" in error
    assert "--overwrite" in error
    assert len(error.splitlines()) == 1
    assert run_cli(tmp_path, settings, "--overwrite", "--lora_r", "99") == 2
    assert snapshot(out) == before
    assert run_cli(tmp_path, settings, "--overwrite", "--max_steps", "1") == 0
    assert not (out / "checkpoint-2").exists()
    assert json.loads((out / "run.json").read_text())["result"]["steps"] == 1


def test_rows_and_a_model_can_be_passed_from_python(settings, model_folder, tokenizer):
    given = {key: value for key, value in settings.items() if key not in ("model_name_or_path", "dataset_name")}
    rows = Dataset.from_list(chat_rows(8))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    values = {**given, "max_steps": 1, "display": "none"}
    result = train_on(values, model=model, tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows)
    assert result.eval_loss < result.eval_loss_before
    assert (result.output_dir / "adapter_config.json").exists()


BAD_INPUT = {
    "a model that does not exist": ({"model_name_or_path": "./no/such/model"}, ["./no/such/model"]),
    "a dataset that does not exist": ({"dataset_name": "./no/such.jsonl"}, ["dataset_name", "./no/such.jsonl"]),
    "target modules that match nothing": (
        {"lora_target_modules": ["q_prj"]},
        ["lora_target_modules", "'q_prj'", "q_proj", "down_proj", "all-linear"],
    ),
    "a rank above a layer": ({"lora_r": 33}, ["model.layers.0.self_attn.q_proj", "32", "33"]),
    "a rank pattern above a layer": ({"rank_pattern": {"v_proj": 40}}, ["v_proj", "40"]),
    "a rank pattern for no layer": ({"rank_pattern": {"w_proj": 4}}, ["rank_pattern", "'w_proj'", "q_proj"]),
    "modules to save that do not exist": ({"modules_to_save": ["heads"]}, ["lora_modules_to_save", "'heads'"]),
    "a checkpoint that does not exist": ({"resume": "nowhere/checkpoint-1"}, ["resume", "nowhere/checkpoint-1"]),
    "an evaluation without rows": ({"eval_strategy": "steps", "eval_size": 0}, ["eval_strategy", "eval_size"]),
    "settings that TRL refuses": ({"padding_free": True}, ["padding_free"]),
    "a template that does not exist": ({"chat_template_path": "no.jinja"}, ["chat_template_path", "no.jinja"]),
}


@pytest.mark.parametrize(("change", "parts"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_with_status_2_and_writes_nothing(tmp_path, settings, change, parts, capsys):
    assert run_cli(tmp_path, {**settings, **change}) == 2
    error = capsys.readouterr().err.strip()
    # Upstream may have said something on the way; ours is the last line.
    line = error.splitlines()[-1]
    assert line.startswith("qriemann: ")
    for part in parts:
        assert part in line
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_pip_install(tmp_path, settings, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "qriemann.training.prepare")
    monkeypatch.setitem(sys.modules, "trl", None)
    assert run_cli(tmp_path, settings) == 2
    assert "pip install trl" in capsys.readouterr().err


def test_the_recipe_script_ends_with_status_2_and_one_line(tmp_path, settings, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "dataset_name": "nobody/nothing"}))
    main = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "sft_chat.py"))["main"]
    assert main(["--config", str(path), "--max_steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "nobody/nothing" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
