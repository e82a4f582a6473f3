"""A random chat model of a few thousand weights that talks until it is stopped, and an adapter that changes what it says."""

from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.models import fill_lora, with_lora
from tests.recipe_fixtures import chat_llama, make_tokenizer


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    model = chat_llama(tokenizer, max_position_embeddings=640, initializer_range=0.3)
    # The end of a turn is never the most likely token.
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = with_lora(AutoModelForCausalLM.from_pretrained(base_folder))
    fill_lora(model, scale=0.5)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def plain(base_folder: Path, adapter_folder: Path) -> PeftModel:
    """Base and adapter by transformers and PEFT alone."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter_folder).eval()
