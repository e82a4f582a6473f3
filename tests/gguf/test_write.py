"""The numbers in the files."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch

from qriemann.errors import InputError
from qriemann.gguf.architectures import Layout
from qriemann.gguf.write import TYPES, size_of, write_adapter
from tests.gguf.models import random_model, write_whole
from tests.models import relative

# Of blocks of 32 normal numbers: the largest is about 2, a step of b bits is 2 * 2 / 2^b, its rounding that over sqrt(12).
RTOL = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 8e-3, "q5_1": 0.06, "q5_0": 0.06, "q4_1": 0.11, "q4_0": 0.11}


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_holds_each_tensor_to_its_type(kind, tmp_path):
    model = random_model("llama")
    tensors, layout = dict(model.named_parameters()), Layout(model)
    reader = gguf.GGUFReader(write_whole(model, tmp_path / "tiny.gguf", kind=kind))
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    assert size_of(layout, shapes, kind) == sum(tensor.n_bytes for tensor in reader.tensors)
    assert {tensor.name for tensor in reader.tensors} == {layout.name(key) for key in tensors}
    for key, tensor in tensors.items():
        outer = key in ("model.embed_tokens.weight", "lm_head.weight") and kind[0] == "q"
        exact = tensor.ndim < 2
        bound = 0 if exact else RTOL["q8_0" if outer else kind]
        assert relative(read(reader, layout.name(key)), layout.as_stored(key, tensor)) <= bound, key


def test_rows_of_half_a_block_are_written_in_float16(tmp_path):
    path = write_whole(random_model("llama", intermediate_size=80), tmp_path / "tiny.gguf", kind="q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"


def test_an_adapter_adds_what_peft_adds(make_case):
    """Read from the file: alpha / r B A, in llama.cpp's order of rows."""
    case = make_case("llama", use_rslora=True, alpha_pattern={"q_proj": 3})
    assert_adds(case, lambda layer: layer.scaling)


@pytest.mark.parametrize("alpha", [0, -4])
def test_an_alpha_that_llama_cpp_would_misread_is_folded(alpha, make_case):
    """Zero means a scaling of one there."""
    assert_adds(make_case("llama", lora_alpha=alpha), lambda layer: alpha / 4)


def assert_adds(case, scaling):
    reader, layout = gguf.GGUFReader(case.write_adapter()), Layout(case.model)
    alpha = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents()
    assert alpha > 0
    assert len(reader.tensors) == 2 * len(case.adapter.layers)
    for module, layer in case.adapter.layers.items():
        name, right = layout.name(f"{module}.weight"), scaling(layer) * layer.b @ layer.a
        a, b = read(reader, f"{name}.lora_a"), read(reader, f"{name}.lora_b")
        found = alpha / len(a) * (b @ a)
        assert torch.allclose(found, layout.as_stored(f"{module}.weight", right), rtol=1e-5, atol=1e-7), module


def test_a_layer_that_llama_cpp_has_not_is_refused(make_case, tmp_path):
    case = make_case("llama")
    layer = next(iter(case.adapter.layers.values()))
    unknown = replace(case.adapter, layers={"model.layers.0.mlp.extra": layer})
    with pytest.raises(InputError, match=r"llama\.cpp's llama has no place for model\.layers\.0\.mlp\.extra\.weight"):
        write_adapter(tmp_path / "adapter.gguf", Layout(case.model), unknown, name="tiny")


def read(reader, name):
    tensor = next(one for one in reader.tensors if one.name == name)
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
