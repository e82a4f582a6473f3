"""What a person writes in YAML or on the command line becomes the run they meant, or one sentence that says why not."""

import dataclasses
import json
from pathlib import Path

import pytest
from trl import SFTConfig

from qriemann.errors import InputError
from qriemann.training.config import _FIXED, _HINTS, config_from_values, load_config
from qriemann.training.values import convert


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
        ("", ["stray"], ["'stray'", "--key"]),
        ("", ["--max_steps"], ["--max_steps"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_key_rule_and_value(write_yaml, text, arguments, parts):
    with pytest.raises(InputError) as caught:
        load_config(write_yaml(text), arguments)
    for part in parts:
        assert part in str(caught.value)


def test_trust_given_on_the_command_line_counts(write_yaml):
    assert load_config(write_yaml("trust_remote_code: true\n"), ["--trust_remote_code"]).sft.trust_remote_code is True


def test_no_secret_leaves_the_configuration(tmp_path):
    settings = {
        "output_dir": str(tmp_path),
        "hub_token": "hf_sesame",
        "method_kwargs": {"api_key": "sesame", "eps": 1e-7},
    }
    written = config_from_values({**settings, "eos_token": "<|im_end|>"}).as_dict()
    assert "sesame" not in json.dumps(written)
    assert written["eos_token"] == "<|im_end|>"
    assert written["method_kwargs"]["eps"] == 1e-7
