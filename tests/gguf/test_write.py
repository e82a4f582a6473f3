"""The numbers in the files."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch

from qriemann.errors import InputError
from qriemann.gguf.architectures import Layout
from qriemann.gguf.write import TYPES, check_adapter, read_back, size_of, write_adapter, write_model
from tests.gguf.models import byte_tokenizer, random_model
from tests.models import relative

# Of blocks of 32 normal numbers: the largest is about 2, a step of b bits is 2 * 2 / 2^b, its rounding that over sqrt(12).
RTOL = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 8e-3, "q5_1": 0.06, "q5_0": 0.06, "q4_1": 0.11, "q4_0": 0.11}


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_holds_each_tensor_to_its_type(kind, tmp_path):
    model = random_model("llama")
    tensors = {key: parameter.detach() for key, parameter in model.named_parameters()}
    layout, path = Layout(model), tmp_path / "tiny.gguf"
    write_model(path, layout, byte_tokenizer(), tensors, tensors.__getitem__, kind, name="tiny")
    read, reader = read_back(path), gguf.GGUFReader(path)
    assert size_of(layout, tensors, kind) == sum(tensor.n_bytes for tensor in reader.tensors)
    assert {tensor.name for tensor in reader.tensors} == {layout.name(key) for key in tensors}
    for key, tensor in tensors.items():
        outer = key in ("model.embed_tokens.weight", "lm_head.weight") and kind[0] == "q"
        exact = tensor.ndim < 2
        bound = 0 if exact else RTOL["q8_0" if outer else kind]
        assert relative(read(layout.name(key)), layout.as_stored(key, tensor)) <= bound, key


def test_rows_of_half_a_block_are_written_in_float16(tmp_path):
    model = random_model("llama", intermediate_size=80)
    tensors = {key: parameter.detach() for key, parameter in model.named_parameters()}
    path = tmp_path / "tiny.gguf"
    write_model(path, Layout(model), byte_tokenizer(), tensors, tensors.__getitem__, "q4_0", name="tiny")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"


def test_an_adapter_adds_what_peft_adds(make_case):
    """Read from the file: alpha / r B A, in llama.cpp's order of rows."""
    case = make_case("llama", use_rslora=True, alpha_pattern={"q_proj": 3})
    read, layout = read_back(case.write_adapter()), Layout(case.model)
    for module, layer in case.adapter.layers.items():
        dense = layer.scaling * layer.b @ layer.a
        right = layout.as_stored(f"{module}.weight", dense)
        assert relative(read(layout.name(f"{module}.weight")), right) < 1e-6, module
    assert read("output.weight") is None


@pytest.mark.parametrize("alpha", [0, -4])
def test_an_alpha_that_llama_cpp_would_misread_is_folded(alpha, make_case):
    """Zero means a scaling of one there."""
    case = make_case("llama", lora_alpha=alpha)
    read, layout = read_back(case.write_adapter()), Layout(case.model)
    name, layer = next(iter(case.adapter.layers.items()))
    right = layout.as_stored(f"{name}.weight", alpha / 4 * layer.b @ layer.a)
    assert torch.allclose(read(layout.name(f"{name}.weight")), right, atol=1e-7)


def test_what_an_adapter_file_cannot_hold_is_refused(make_case, tmp_path):
    case = make_case("llama.tied")
    whole = replace(case.adapter, replaced={"model.norm.weight": torch.zeros(64)})
    with pytest.raises(InputError, match=r"got model\.norm\.weight, trained whole; export the merged model, --to gguf"):
        check_adapter(whole, case.model, merged=False)
    check_adapter(whole, case.model, merged=True)
    layer = next(iter(case.adapter.layers.values()))
    head = replace(case.adapter, layers={"lm_head": layer})
    with pytest.raises(InputError, match="the head is the embeddings in this base"):
        check_adapter(head, case.model, merged=True)
    unknown = replace(case.adapter, layers={"model.layers.0.mlp.extra": layer})
    with pytest.raises(InputError, match=r"llama\.cpp's llama has no place for model\.layers\.0\.mlp\.extra\.weight"):
        write_adapter(tmp_path / "adapter.gguf", Layout(case.model), unknown, name="tiny")
