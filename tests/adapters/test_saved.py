"""A downloaded adapter computes what it does in PEFT, or is refused in one line that says what is wrong with it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qriemann.adapters.saved import read_adapter, saved_tokenizer
from qriemann.adapters.saved_config import CONFIG
from qriemann.adapters.saved_tensors import PICKLE, WEIGHTS
from qriemann.errors import InputError
from tests.models import edit_json, fill_lora, logits, tiny_llama, token_batch, with_lora, word_tokenizer

IDS = token_batch()
PREFIX = "base_model.model.model.layers.0."


def save(folder: Path, **options) -> Path:
    model = with_lora(tiny_llama(), **options)
    fill_lora(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "down_proj"])


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "adapter"))


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = tensor
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / WEIGHTS)


def pickle_instead(folder: Path) -> Path:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()
    return folder / PICKLE


Q_A, Q_B = (f"{PREFIX}self_attn.q_proj.lora_{side}.weight" for side in "AB")
WRONG = {
    "a pickle that nobody asked for": (pickle_instead, "a pickle, where safetensors are wanted"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "a file cut short": (lambda f: os.truncate(f / WEIGHTS, 3000), "not a complete safetensors file"),
    "a NaN": (lambda f: change(f, Q_A, torch.full((4, 64), torch.nan)), "finite numbers"),
    "integers": (lambda f: change(f, Q_A, torch.ones(4, 64, dtype=torch.int64)), "torch.int64"),
    "a tensor without numbers": (lambda f: change(f, Q_A, torch.ones(0, 64)), "(0, 64)"),
    "factors of two ranks": (lambda f: change(f, Q_A, torch.ones(3, 64)), "of the rank 4"),
    "another rank than the configuration says": (lambda f: edit_json(f / CONFIG, r=8), "of the rank 8"),
    "a factor alone": (lambda f: change(f, Q_B, None), "factors B"),
    "a tensor of another method": (
        lambda f: change(f, f"{PREFIX}x.lora_magnitude_vector", torch.ones(4)),
        "plain LoRA",
    ),
    "no configuration": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "a configuration that is a list": (lambda f: (f / CONFIG).write_text("[1]"), "JSON object"),
    "another method": (lambda f: edit_json(f / CONFIG, peft_type="LOHA"), "must be LoRA"),
    "DoRA": (lambda f: edit_json(f / CONFIG, use_dora=True), "use_dora"),
    "a start that changes the base": (lambda f: edit_json(f / CONFIG, init_lora_weights="pissa"), "pissa"),
    "a path that leaves": (lambda f: edit_json(f / CONFIG, megatron_core="x/../../y"), "stay in its folder"),
    "a rank that is no number": (lambda f: edit_json(f / CONFIG, r="4"), "r must not be"),
    "an alpha that is not finite": (lambda f: edit_json(f / CONFIG, lora_alpha=float("inf")), "lora_alpha must be"),
    # What does not fit the base.
    "a layer that the file lacks": (
        lambda f: [change(f, name, None) for name in (Q_A, Q_B)],
        "got none for base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ),
    "a layer that the configuration does not name": (
        lambda f: edit_json(f / CONFIG, target_modules=["q_proj"]),
        "down_proj",
    ),
    "a layer that the base lacks": (
        lambda f: [change(f, name.replace("q_proj", "w_proj"), torch.ones(4, 4)) for name in (Q_A, Q_B)],
        "got also base_model.model.model.layers.0.self_attn.w_proj",
    ),
    "a factor of another width": (lambda f: change(f, Q_A, torch.ones(4, 63)), "[4, 63]"),
    "a norm that nobody said was trained": (
        lambda f: change(f, "base_model.model.model.norm.weight", torch.zeros(64)),
        "model.norm.weight",
    ),
    "a head that was announced and is not there": (
        lambda f: edit_json(f / CONFIG, modules_to_save=["lm_head"]),
        "lm_head",
    ),
    "a head of another size": (lambda f: change(f, "base_model.model.lm_head.weight", torch.ones(25, 64)), "[25, 64]"),
}


@pytest.mark.parametrize(("hurt", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_folder_is_one_line(folder, hurt, words):
    hurt(folder)
    with pytest.raises(InputError) as caught:
        read_adapter(folder).put_on(tiny_llama(), "tiny")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_read_for_who_names_it(folder):
    expected = read_adapter(folder).layers
    found = read_adapter(pickle_instead(folder))
    assert found.layers.keys() == expected.keys()
    for name, layer in found.layers.items():
        assert torch.equal(layer.a, expected[name].a)
        assert torch.equal(layer.b, expected[name].b)
    whole = logits(PeftModel.from_pretrained(tiny_llama(), folder))
    assert torch.equal(logits(found.put_on(tiny_llama(), "tiny")), whole)


def test_code_in_a_named_pickle_is_not_run(folder):
    ran = folder / "ran"

    class Touch:
        def __reduce__(self):
            return (Path.touch, (ran,))

    pickled = pickle_instead(folder)
    torch.save({Q_A: Touch()}, pickled)
    with pytest.raises(InputError, match="pickle of tensors alone"):
        read_adapter(pickled)
    assert not ran.exists()


def test_a_tokenizer_that_asks_for_code_is_refused_without_a_question(folder):
    word_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "EvilTokenizer"}
    edit_json(path, **own)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="contains custom code"):
        saved_tokenizer(folder)
    assert not (folder / "ran").exists()


NAMES_OF_FILES = {
    "fast_tokenizer_files": ["../elsewhere/tokenizer.4.0.json"],
    "vocab_file": "/etc/passwd",
    "vocab": "../elsewhere/vocab.json",
    "gguf_file": "../../x.gguf",
    "init_inputs": ["~/vocab.txt"],
}


@pytest.mark.parametrize(("key", "value"), NAMES_OF_FILES.items(), ids=NAMES_OF_FILES.keys())
def test_a_tokenizer_that_names_a_file_elsewhere_is_refused(folder, key, value):
    word_tokenizer().save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    edit_json(config, **{key: value})
    with pytest.raises(InputError, match=f"must stay in its folder, got .* for '{key}'"):
        saved_tokenizer(folder)


def test_a_tokenizer_may_say_where_it_was_once_loaded_from(folder):
    word_tokenizer().save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    history = {
        "name_or_path": "/home/x",
        "tokenizer_file": "/home/x/t.json",
        "special_tokens_map_file": "/home/x/s.json",
    }
    edit_json(config, **history)
    assert saved_tokenizer(folder).get_vocab() == word_tokenizer().get_vocab()
