"""llama.cpp computes with our files what transformers and PEFT compute, for every type of model that may become one."""

from __future__ import annotations

import gguf
import pytest

from qriemann.errors import InputError
from qriemann.gguf import compare
from qriemann.gguf.architectures import ARCHITECTURES, Layout
from tests.gguf.models import CONFIGS, byte_tokenizer, random_model

# Measured: 1e-5 in float32, and 2e-3 where llama.cpp looks GELU up in a table of float16 numbers.
ATOL, GELU_ATOL = 1e-4, 8e-3


def test_every_type_of_the_table_has_a_model_here():
    assert {name.partition(".")[0] for name in CONFIGS} == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_base_and_adapter_give_the_probabilities_of_peft(name, make_case):
    case = make_case(name)
    seen = case.run(case.write_base(), case.write_adapter())
    assert not seen.failure
    # The adapter is no small matter, so a file without it would be seen.
    assert case.recording.untrained["mean_kl"] > 0.01
    gelu = ARCHITECTURES[case.model.config.model_type].gelu
    assert seen.figures["largest_difference"] < (GELU_ATOL if gelu else ATOL)
    assert seen.figures["top_agreement"] == 1.0
    assert seen.figures["loss"] == pytest.approx(seen.figures["recorded_loss"], abs=GELU_ATOL if gelu else ATOL)


DAMAGES = {
    "a scaling that is five percent off": lambda name, layer: layer._replace(scaling=1.05 * layer.scaling),
    # llama.cpp loads a part of an adapter without a word.
    "a missing module": lambda name, layer: None if name == "model.layers.1.mlp.up_proj" else layer,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_wrong_adapter_is_seen(damage, make_case):
    case = make_case("llama")
    seen = case.run(case.write_base(), case.write_adapter(damage))
    assert "log-probabilities differ" in compare.far(seen, 0.01)[0]


def test_another_template_is_seen(make_case):
    case, other = make_case("llama"), byte_tokenizer()
    right = case.run(case.write_base(), case.write_adapter(), talk=True)
    assert compare.far(right, 0.01) == []
    assert right.asked == 1
    other.chat_template = other.chat_template.replace("Be brief.", "Be clear.")
    seen = case.run(case.write_base(tokenizer=other), case.write_adapter(), talk=True)
    assert "llama.cpp makes other tokens of" in compare.far(seen, 0.01)[0]


def test_a_file_that_does_not_load_says_why(make_case):
    case = make_case("llama")
    base = case.write_base()
    base.write_bytes(base.read_bytes()[:-2000])
    (reason,) = compare.far(case.run(base, None), 0.01)
    assert "not within the file bounds" in reason


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "can be written for gemma, .* got 'gpt2'"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers of a smollm3 must be"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar of a gemma2 must be 32"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "got 'yarn'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, changes, message, tmp_path):
    model = random_model(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    with pytest.raises(InputError, match=message):
        Layout(model).describe(Recorder())


@pytest.mark.parametrize(("name", "length"), [("mistral", 64), ("gemma2", 512), ("llama", 512)])
def test_a_window_that_llama_cpp_does_not_compute_limits_the_length(name, length):
    """Up to there a model without a window is the same."""
    writer = gguf.GGUFWriter(None, "tiny")
    Layout(random_model(name)).describe(writer)
    assert writer.kv_data[0]["tiny.context_length"].value == length


class Recorder:
    """Stands for a writer whose file nobody needs."""

    def __getattr__(self, name):
        return lambda *_: None
