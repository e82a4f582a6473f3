"""What a person writes in YAML or on the command line becomes the run they meant, or one sentence that says why not."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from trl import SFTConfig

from qriemann.config.settings import _FIXED, _HINTS, config_from_values, load_config
from qriemann.config.values import convert
from qriemann.errors import InputError


@pytest.fixture
def write_yaml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(f"output_dir: {tmp_path / 'out'}\n{text}")
        return path

    return write


def test_the_command_line_overrides_the_file(write_yaml):
    path = write_yaml("max_steps: 10\nlora_r: 8\nlora_target_modules: [q_proj, v_proj]\n")
    config = load_config(path, ["--max_steps", "3", "--lora-target-modules", "k_proj", "o_proj", "--packing"])
    assert (config.sft.max_steps, config.model.lora_r, config.sft.packing) == (3, 8, True)
    assert config.model.lora_target_modules == ["k_proj", "o_proj"]


def test_a_number_that_yaml_reads_as_a_string_is_a_number(write_yaml):
    assert load_config(write_yaml("learning_rate: 1e-4\n")).sft.learning_rate == 1e-4


def test_a_null_learning_rate_leaves_the_choice_to_the_method(write_yaml):
    assert "learning_rate" not in load_config(write_yaml("learning_rate: null\n")).explicit


def test_a_null_for_activation_checkpointing_leaves_the_choice_to_the_device(write_yaml):
    chosen = load_config(write_yaml("")).sft.activation_checkpointing
    assert load_config(write_yaml("activation_checkpointing: null\n")).sft.activation_checkpointing is chosen


def test_a_value_that_is_read_as_a_files_name_is_refused_in_one_line(write_yaml):
    with pytest.raises(InputError, match="training arguments"):
        load_config(write_yaml("accelerator_config: nowhere.json\n"))


def test_the_resume_flag_alone_means_the_last_checkpoint(write_yaml):
    assert load_config(write_yaml(""), ["--resume"]).qriemann.resume == "auto"
    assert load_config(write_yaml(""), ["--resume", "out/checkpoint-4"]).qriemann.resume == "out/checkpoint-4"
    assert load_config(write_yaml("resume_from_checkpoint: true\n")).qriemann.resume == "auto"


PLAIN_FIELDS = [
    f for f in dataclasses.fields(SFTConfig) if f.name not in _FIXED and f.default is not dataclasses.MISSING
]


@pytest.mark.parametrize("field", PLAIN_FIELDS, ids=lambda field: field.name)
def test_every_default_of_trl_passes_through_unchanged(field):
    assert convert(_HINTS[field.name], field.default, choices=field.metadata.get("choices")) == field.default


@pytest.mark.parametrize(
    ("text", "arguments", "parts"),
    [
        ("lerning_rate: 1\n", [], ["'lerning_rate'", "run.yaml", "'learning_rate'"]),
        ("", ["--lora-rr", "4"], ["'lora_rr'", "command line", "'lora_r'"]),
        ("max_steps: 1.5\n", [], ["max_steps", "an integer", "1.5"]),
        ("packing: maybe\n", [], ["packing", "true or false", "'maybe'"]),
        ("loss_on: user\n", [], ["loss_on", "assistant, all", "'user'"]),
        ("lora_r: 0\n", [], ["lora_r", "at least 1", "0"]),
        ("lora_dropout: 1.0\n", [], ["lora_dropout", "[0, 1)", "1.0"]),
        ("rank_pattern: 3\n", [], ["rank_pattern", "a mapping", "3"]),
        ("use_dora: true\n", [], ["use_dora", "DoRA"]),
        ("optim: adamw_torch\n", [], ["optim", "method"]),
        ("load_in_4bit: false\nquantize: nf4\n", [], ["load_in_4bit", "quantize"]),
        ("modules_to_save: [a]\nlora_modules_to_save: [b]\n", [], ["lora_modules_to_save", "two names"]),
        ("resume: true\noverwrite: true\n", [], ["resume", "overwrite"]),
        ("trust_remote_code: true\n", [], ["trust_remote_code", "command line", "--trust_remote_code"]),
        ("a: [1\n", [], ["valid YAML", "line 3"]),
        ("seed: 1\nlora_r: 4\nseed: 2\n", [], ["'seed' a second time", "line 4"]),
        ("method_kwargs: {eps: 1, eps: 2}\n", [], ["'eps' a second time", "line 2"]),
        ("lora_target_modules: &names [q_proj]\nlora_modules_to_save: *names\n", [], ["an alias", "line 3"]),
        ("<<: {seed: 1}\n", [], ["a merge key", "line 2"]),
        (f"run_name: {'[' * 3000}{']' * 3000}\n", [], ["more than 20 levels", "line 2"]),
        (f"run_name: {'x' * 2**16}\n", [], ["at most 65536 characters"]),
        (f"seed: {'9' * 5000}\n", [], ["valid YAML"]),
        (f"seed: 0x{'f' * 5000}\n", [], ["seed", "an integer", "got a int"]),
        (f"run_name: [{'x, ' * 1000}]\n", [], ["run_name", "a string", "..."]),
        ("seed: !!int foo\n", [], ["valid YAML", "'foo'"]),
        ("packing: !!bool foo\n", [], ["valid YAML", "'foo'"]),
        ("run_name: !!timestamp foo\n", [], ["valid YAML"]),
        ('run_name: "\\UFFFFFFFF"\n', [], ["valid YAML"]),
        ("save_steps: .inf\n", [], ["save_steps", "a finite number", "inf"]),
        ("num_train_epochs: .inf\n", [], ["num_train_epochs", "a finite number", "inf"]),
        ("learning_rate: .nan\n", [], ["learning_rate", "a finite number", "nan"]),
        (f"max_steps: 1{'0' * 300}\n", [], ["max_steps", "an integer", "1000"]),
        (f"method_kwargs: '{'[' * 50000}'\n", [], ["method_kwargs", "a mapping", "..."]),
        ("env: {A=B: x}\n", [], ["env", "'A=B'"]),
        ("env: {'': x}\n", [], ["env", "''"]),
        ('env: {A: "x\\0y"}\n', [], ["A in env", "a string"]),
        ("env: {A: [1]}\n", [], ["A in env", "a string"]),
        ("", ["stray"], ["'stray'", "--key"]),
        ("", ["--max_steps"], ["--max_steps"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_key_rule_and_value(write_yaml, text, arguments, parts):
    with pytest.raises(InputError) as caught:
        load_config(write_yaml(text), arguments)
    for part in parts:
        assert part in str(caught.value)


def test_a_message_is_one_short_line(write_yaml):
    for text in (
        f"{'k' * 60000}: 1",
        f"run_name: [{'x, ' * 20000}]",
        f"seed: 0x{'f' * 60000}",
        f"a: !<{'t' * 60000}> 1",
    ):
        with pytest.raises(InputError) as caught:
            load_config(write_yaml(text))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_date_is_a_string(write_yaml):
    for date in ("2024-10-10", "2024-13-45", "2024-10-10 10:00:00"):
        assert load_config(write_yaml(f"run_name: {date}\n")).sft.run_name == date


def test_the_files_environment_is_set(write_yaml, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    load_config(write_yaml("env: {WANDB_PROJECT: mine, OMP_NUM_THREADS: 2}\n"))
    assert os.environ == {"WANDB_PROJECT": "mine", "OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize("kind", ["fifo", "folder", "endless"])
def test_what_is_no_file_is_no_configuration(tmp_path, kind):
    path = tmp_path / "run.yaml"
    make = {"fifo": os.mkfifo, "folder": os.mkdir, "endless": lambda path: path.symlink_to("/dev/zero")}
    make[kind](path)
    with pytest.raises(InputError, match="which is no file"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("hub_token: [sesame]\n", []),
        ("hub_token: {a: sesame}\n", []),
        ("rank_pattern: [{password: sesame}]\n", []),
        ("env: ['HF_TOKEN=sesame']\n", []),
        ("env: {HF_TOKEN: [sesame]}\n", []),
        ("env: HF_TOKEN=sesame\n", []),
        ("", ["hub_token=sesame"]),
        ("", ["--hub_tokn", "sesame"]),
        ("", ["--hub_tokn=sesame"]),
    ],
)
def test_no_message_repeats_the_value_of_a_secret(write_yaml, text, arguments):
    with pytest.raises(InputError) as caught:
        load_config(write_yaml(text), arguments)
    assert "sesame" not in str(caught.value)


def test_trust_given_on_the_command_line_counts(write_yaml):
    assert load_config(write_yaml("trust_remote_code: true\n"), ["--trust_remote_code"]).sft.trust_remote_code is True


def test_no_secret_leaves_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "open-sesame-open")
    settings = {
        "output_dir": str(tmp_path),
        "hub_token": "hf_sesame",
        "method_kwargs": {"api_key": "sesame", "eps": 1e-7},
    }
    written = config_from_values({**settings, "eos_token": "<|im_end|>", "run_name": "a open-sesame-open"}).as_dict()
    assert "sesame" not in json.dumps(written)
    assert written["eos_token"] == "<|im_end|>"
    assert written["run_name"] == "a <redacted>"
    assert written["method_kwargs"]["eps"] == 1e-7
