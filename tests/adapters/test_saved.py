"""An adapter's folder from anybody: what PEFT would compute, or one line that says what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from qriemann.adapters.saved import PICKLE, WEIGHTS, read_adapter, saved_tokenizer
from qriemann.adapters.saved_config import CONFIG
from qriemann.errors import InputError
from tests.fuzz import at_length, damage, damages, hostile_input, values
from tests.models import fill_lora, tiny_llama, token_batch, with_lora, word_tokenizer

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


def set_keys(folder: Path, **keys) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = tensor
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / WEIGHTS)


def pickle_instead(folder: Path) -> Path:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()
    return folder / PICKLE


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


OPTIONS = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 7, r".*0\.mlp.down_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "rslora": {"use_rslora": True},
    "a pattern of targets": {
        "target_modules": r".*layers\.\d+\.self_attn\.(q|v)_proj",
        "exclude_modules": r".*1.*v_proj",
    },
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "a trained head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "biases": {"bias": "all", "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_put_on_its_base_it_computes_what_peft_does(tmp_path, options):
    save(tmp_path, **options)
    ours = read_adapter(tmp_path).put_on(tiny_llama(), "tiny")
    expected = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    assert torch.equal(logits(ours), expected)
    assert not torch.equal(expected, logits(tiny_llama()))


@pytest.mark.parametrize("options", [OPTIONS["patterns"], OPTIONS["rslora"]], ids=["patterns", "rslora"])
def test_a_layers_change_is_the_one_that_peft_adds(tmp_path, options):
    save(tmp_path, **options)
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for name, layer in read_adapter(tmp_path).layers.items():
        expected = peft.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        torch.testing.assert_close(layer.scaling * layer.b @ layer.a, expected)


def lie_about_sizes(folder: Path) -> None:
    """A header whose one tensor claims a megabyte of a file that is shorter."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [512, 512], "data_offsets": [0, 2**20]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 64)


Q_A, Q_B = (f"{PREFIX}self_attn.q_proj.lora_{side}.weight" for side in "AB")
DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "a pickle that nobody asked for": (pickle_instead, PICKLE),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "a file cut short": (lambda f: os.truncate(f / WEIGHTS, 3000), "whole safetensors file"),
    "an empty file": (lambda f: os.truncate(f / WEIGHTS, 0), "whole safetensors file"),
    "a header longer than the file": (
        lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"),
        "whole safetensors file",
    ),
    "a header that lies about sizes": (lie_about_sizes, "whole safetensors file"),
    "a NaN": (lambda f: change(f, Q_A, torch.full((4, 64), torch.nan)), "finite numbers"),
    "an infinity": (lambda f: change(f, Q_B, torch.full((64, 4), torch.inf)), "finite numbers"),
    "a product that is not finite": (lambda f: change(f, Q_B, torch.full((64, 4), 3e38)), "finite numbers"),
    "integers": (lambda f: change(f, Q_A, torch.ones(4, 64, dtype=torch.int64)), "I64"),
    "a tensor without numbers": (lambda f: change(f, Q_A, torch.ones(0, 64)), "[0, 64]"),
    "numbers of eight bits": (lambda f: change(f, Q_A, torch.ones(4, 64).to(torch.float8_e4m3fn)), "F8_E4M3"),
    "factors of two ranks": (lambda f: change(f, Q_A, torch.ones(3, 64)), "rank r = 4"),
    "another rank than the configuration says": (lambda f: set_keys(f, r=8), "rank r = 8"),
    "a factor alone": (lambda f: change(f, Q_B, None), "factors B"),
    "a factor of three dimensions": (lambda f: change(f, Q_A, torch.ones(4, 64, 1)), "plain LoRA"),
    "a tensor of another method": (
        lambda f: change(f, f"{PREFIX}x.lora_magnitude_vector", torch.ones(4)),
        "plain LoRA",
    ),
    "no configuration": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "a configuration that is a list": (lambda f: (f / CONFIG).write_text("[1]"), "JSON object"),
    "a configuration that is no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "JSON"),
    "a configuration of a thousand brackets": (lambda f: (f / CONFIG).write_text(DEEP), "JSON"),
    "a configuration of megabytes": (lambda f: (f / CONFIG).write_text(f'{{"r": {"9" * 2**21}}}'), "JSON object"),
    "another method": (lambda f: set_keys(f, peft_type="LOHA"), "must be LoRA"),
    "a method that does not exist": (lambda f: set_keys(f, peft_type=["LORA"]), "must be LoRA"),
    "DoRA": (lambda f: set_keys(f, use_dora=True), "use_dora"),
    "a start that changes the base": (lambda f: set_keys(f, init_lora_weights="pissa"), "pissa"),
    "code of its own": (lambda f: set_keys(f, auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "a request to trust code": (lambda f: set_keys(f, eva_config={"trust_remote_code": True}), "trust_remote_code"),
    "an absolute path": (lambda f: set_keys(f, corda_config={"cache_file": "/etc/passwd"}), "stay in its folder"),
    "a path that leaves": (lambda f: set_keys(f, megatron_core="x/../../y"), "stay in its folder"),
    "a revision that leaves": (lambda f: set_keys(f, revision="../../../x"), "stay in its folder"),
    "a rank that is no number": (lambda f: set_keys(f, r="4"), "r must be"),
    "a rank of zero": (lambda f: set_keys(f, r=0), "r must be"),
    "an alpha that is not finite": (lambda f: set_keys(f, lora_alpha=float("inf")), "lora_alpha must be"),
    "targets that are no names": (lambda f: set_keys(f, target_modules=[["q_proj"]]), "target_modules must be"),
    "a base that is no name": (lambda f: set_keys(f, base_model_name_or_path=["x"]), "base_model_name_or_path must"),
    "a pattern without end": (lambda f: set_keys(f, rank_pattern={"(": 4}), "rank_pattern must be"),
    "more patterns than layers": (
        lambda f: set_keys(f, alpha_pattern={f"x{i}": 4 for i in range(1001)}),
        "alpha_pattern must be at most 1000 names",
    ),
}


@pytest.mark.parametrize(("hurt", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_wrong_with_a_folder_is_one_line(folder, hurt, words):
    hurt(folder)
    with pytest.raises(InputError) as caught:
        read_adapter(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


UNFIT = {
    "a layer that the file lacks": (
        lambda f: [change(f, name, None) for name in (Q_A, Q_B)],
        "got none for model.layers.0",
    ),
    "a layer that the configuration does not name": (lambda f: set_keys(f, target_modules=["q_proj"]), "down_proj"),
    "a layer that the base lacks": (
        lambda f: [change(f, name.replace("q_proj", "w_proj"), torch.ones(4, 4)) for name in (Q_A, Q_B)],
        "no such linear layer",
    ),
    "a factor of another width": (lambda f: change(f, Q_A, torch.ones(4, 63)), "64 x 63"),
    "a norm that nobody said was trained": (
        lambda f: change(f, "base_model.model.model.norm.weight", torch.zeros(64)),
        "model.norm.weight",
    ),
    "a head that was announced and is not there": (lambda f: set_keys(f, modules_to_save=["lm_head"]), "lm_head"),
    "a head of another size": (lambda f: change(f, "base_model.model.lm_head.weight", torch.ones(25, 64)), "(25, 64)"),
}


@pytest.mark.parametrize(("hurt", "words"), UNFIT.values(), ids=UNFIT.keys())
def test_what_does_not_fit_its_base_is_one_line(folder, hurt, words):
    hurt(folder)
    adapter = read_adapter(folder)
    with pytest.raises(InputError) as caught:
        adapter.put_on(tiny_llama(), "tiny")
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


def test_a_pickled_view_that_claims_more_than_it_holds_is_refused(folder):
    pickled = pickle_instead(folder)
    torch.save({Q_A: torch.zeros(1).expand(10**6, 10**6)}, pickled)
    with pytest.raises(InputError, match="plain tensors"):
        read_adapter(pickled)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(.|.)(.|.)(.|.)(.|.)", ".*.*.*.*.*x"])
def test_a_pattern_that_takes_for_ever_is_not_tried(folder, pattern):
    name = f"base_model.model.{'a' * 60}.lora_"
    change(folder, f"{name}A.weight", torch.ones(4, 8))
    change(folder, f"{name}B.weight", torch.ones(8, 4))
    set_keys(folder, alpha_pattern={pattern: 4})
    began = time.process_time()
    with pytest.raises(InputError, match="alpha_pattern must be"):
        read_adapter(folder)
    assert time.process_time() - began < 1


def test_as_many_patterns_as_are_allowed_take_seconds_not_minutes(folder):
    set_keys(folder, rank_pattern={f"x{i}": 4 for i in range(1000)}, alpha_pattern={f"x{i}": 4 for i in range(1000)})
    expected = logits(read_adapter(folder).put_on(tiny_llama(), "tiny"))
    started = time.perf_counter()
    read_adapter(folder).put_on(tiny_llama(), "tiny")
    # A second here; PEFT, which compiles each of them for each layer, is at it for 9 s.
    assert time.perf_counter() - started < 5
    set_keys(folder, rank_pattern={}, alpha_pattern={})
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder)), expected)


def test_targets_by_a_pattern_that_takes_for_ever_are_those_in_the_file(folder):
    # Each layer's name once as a whole, and before it what PEFT would search until the end of the world.
    slow = "(.*.*)*" * 8
    set_keys(folder, target_modules=rf"{slow}\.zz|.*\.(q_proj|down_proj)")
    adapter = read_adapter(folder)
    began = time.process_time()
    adapter.put_on(tiny_llama(), "tiny")
    assert time.process_time() - began < 5


def test_a_tokenizer_that_asks_for_code_is_refused_without_a_question(folder):
    word_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "EvilTokenizer"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="contains custom code"):
        saved_tokenizer(folder)
    assert not (folder / "ran").exists()


# Fuzzing.

SMALL = {f"base_model.model.l.{layer}.lora_{side}.weight": side for layer in "pq" for side in "AB"}
TINY = {name: torch.ones(2, 3) if side == "A" else torch.ones(4, 2) for name, side in SMALL.items()}
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["p", "q"]}


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
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
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
    config.write_text(json.dumps(json.loads(config.read_text()) | history))
    assert saved_tokenizer(folder).get_vocab() == word_tokenizer().get_vocab()


def test_a_chat_template_without_end_is_refused(folder, monkeypatch):
    monkeypatch.setattr("qriemann.base.chat_template._SECONDS", 0.2)
    tokenizer = word_tokenizer()
    rows = "{% for a in range(99999) %}"
    tokenizer.chat_template = f"{rows}{rows}{'{% endfor %}' * 2}"
    tokenizer.save_pretrained(folder)
    before = sys.gettrace()
    with pytest.raises(InputError, match="must render within"):
        saved_tokenizer(folder)
    assert sys.gettrace() is before


def check_reading(folder: Path) -> None:
    """What is read is finite and consistent with the file's own configuration, or refused in one line."""
    with hostile_input(folder):
        adapter = read_adapter(folder)
        assert adapter.layers
        for layer in adapter.layers.values():
            assert layer.a.shape[0] == layer.b.shape[1] > 0
            assert layer.a.isfinite().all()
            assert layer.b.isfinite().all()
            assert abs(layer.scaling) < float("inf")


def read_folder_of_anyone(tmp_path, config, tensors, broken, where):
    (tmp_path / CONFIG).write_text(json.dumps(config) if isinstance(config, dict) else config, errors="surrogatepass")
    save_file(tensors, tmp_path / WEIGHTS)
    if broken is not None:
        path = tmp_path / where
        path.write_bytes(damage(path.read_bytes(), *broken[:2], cut=broken[2]))
    check_reading(tmp_path)


field_names = sorted(field.name for field in dataclasses.fields(LoraConfig))
reaching = st.sampled_from(["/etc/passwd", "../x", "~/x", "C:\\x", "(a+)+$", "q|", "pissa_niter_4", "loftq", "eva"])
odd_keys = st.sampled_from([*field_names, "auto_map", "trust_remote_code"]) | st.text(max_size=8)
odd_values = values | reaching | st.dictionaries(reaching | st.sampled_from(["p", "q", ".*"]), values, max_size=2)
configs = st.dictionaries(odd_keys, odd_values, max_size=3).map(lambda changes: {**PLAIN, **changes})
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float8_e5m2])
shapes = st.sampled_from([(2, 3), (4, 2), (2, 2), (0, 3), (2,), (), (1, 2, 3), (4, 0)])
fills = st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -1e38, 1e-45])
odd_tensors = st.builds(lambda shape, dtype, fill: torch.full(shape, fill).to(dtype), shapes, dtypes, fills)
tensor_sets = st.dictionaries(
    st.sampled_from([*SMALL, "base_model.model.l.p.lora_A.default.weight", "lora_", "l.norm.weight"])
    | st.text(max_size=9),
    odd_tensors,
    max_size=2,
).map(lambda changes: {**TINY, **changes})
test_any_adapter_is_read_or_refused, test_10_000_adapters = at_length(
    read_folder_of_anyone,
    {
        "config": st.just(PLAIN) | configs | st.text(max_size=30),
        "tensors": st.just(TINY) | tensor_sets,
        "broken": st.none() | damages,
        "where": st.sampled_from([CONFIG, WEIGHTS]),
    },
)


def read_header_of_anyone(tmp_path, header, length, rest):
    (tmp_path / CONFIG).write_text(json.dumps(PLAIN))
    text = (json.dumps(header) if isinstance(header, dict) else header).encode(errors="surrogatepass")
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + rest)
    check_reading(tmp_path)


offsets = st.integers(-1, 64) | st.sampled_from([2**31, 2**63 - 1, 2**64 - 1, 2**64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I64", "F8_E4M3", "F4", "BOOL", "C64", ""]),
        "shape": st.lists(st.integers(0, 4) | st.sampled_from([-1, 2**32, 2**63]), max_size=3),
        "data_offsets": st.lists(offsets, min_size=2, max_size=2),
    }
)
test_any_header_is_read_or_refused, test_10_000_headers = at_length(
    read_header_of_anyone,
    {
        "header": st.dictionaries(st.sampled_from([*SMALL, "__metadata__"]), entries | values, max_size=4)
        | st.text(max_size=40),
        "length": st.none() | st.integers(0, 2**64 - 1),
        "rest": st.binary(max_size=64),
    },
)
