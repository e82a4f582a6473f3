"""`offload_embeddings: true` changes where the embeddings are and nothing that comes out of a run."""

import pytest
from safetensors.torch import load_file

from qriemann.base.host_embedding import HostEmbedding
from qriemann.errors import InputError
from tests.models import tiny_llama
from tests.recipe_fixtures import train_on


@pytest.fixture
def run(tmp_path, settings):
    def run(name, **changes):
        steps = {"max_steps": 2, "per_device_train_batch_size": 2, "activation_checkpointing": True, "use_cpu": True}
        result = train_on({**settings, "output_dir": str(tmp_path / name), **steps, **changes})
        result.trainer.end()
        return result

    return run


def test_the_saved_adapter_is_that_of_embeddings_on_the_device(run):
    kept, offloaded = run("kept"), run("offloaded", offload_embeddings=True)
    assert isinstance(offloaded.model.get_input_embeddings(), HostEmbedding)
    assert offloaded.eval_loss == kept.eval_loss
    left, right = (load_file(result.output_dir / "adapter_model.safetensors") for result in (kept, offloaded))
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)
    assert any(tensor.abs().max() > 0 for tensor in left.values())


def test_embeddings_that_are_to_be_trained_are_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"embed_tokens and offload_embeddings exclude each other"):
        run("refused", offload_embeddings=True, lora_modules_to_save=["embed_tokens"])
    assert not (tmp_path / "refused").exists()


def test_tied_embeddings_are_refused_by_the_models_name(run, tmp_path, tokenizer):
    model = tiny_llama(vocabulary=len(tokenizer))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    with pytest.raises(InputError, match=r"tied.*offload_embeddings must be false"):
        run("refused", offload_embeddings=True, model_name_or_path=str(tmp_path / "tied"))
    assert not (tmp_path / "refused").exists()
