"""llama.cpp cuts a text into the tokens that the training's tokenizer makes of it, for every way of cutting in the table."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qriemann.errors import InputError
from qriemann.gguf.vocabulary import _REST, _WORDS, begins_with_bos, write_vocabulary
from tests.gguf.models import byte_tokenizer
from tests.models import word_tokenizer
from tests.recipe_fixtures import CHATML, with_turns

TEXTS = [
    "  two  spaces 2026 and 3.14159; x = 12345\n\n\n\ttab DON'T we'll I'd he's the the the end ",
    "naïve Ünïcode 中文字符 日本語 العربية 🙂 ½ €100 №5",
    'def f(x):\n    return {"a": [1, 22, 333, 4444]}  # done!!! ... https://x.org/?q=1&r=%20',
] * 3


def split(pattern: str) -> Any:
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


DIGITS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
CUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "smollm": (pre_tokenizers.Sequence(DIGITS), {}),
    "llama-bpe": (split(_WORDS + r"\p{N}{1,3}" + _REST), {"ignore_merges": True}),
    "dbrx": (split(_WORDS + r"\p{N}{1,3}" + _REST), {}),
    "qwen2": (split(_WORDS + r"\p{N}" + _REST), {}),
}


def learned(pre_tokenizer: Any, **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level pairs learned on a few texts."""
    core = Tokenizer(models.BPE(**options))
    core.pre_tokenizer, core.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return with_turns(core)


def sentencepiece(*, space: bool) -> PreTrainedTokenizerFast:
    """Pairs learned as SentencePiece's models are held in tokenizer.json, with bytes for what they lack."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if space else steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    core.train_from_iterator([" ".join(TEXTS[::2])] * 3, trainer)
    return with_turns(core, bos_token="<s>", unk_token="<unk>")


def assert_same_tokens(make_case: Any, tokenizer: Any) -> gguf.GGUFReader:
    """Of hard texts and of conversations; returns the file."""
    case = make_case("llama", tokenizer)
    path = case.write_base()
    seen = case.run(path, None, talk=True)
    assert not seen.failure
    assert seen.retold == ()
    return gguf.GGUFReader(path)


@pytest.mark.parametrize("name", CUTS)
def test_a_text_becomes_the_same_tokens(name, make_case):
    pre_tokenizer, options = CUTS[name]
    written = assert_same_tokens(make_case, learned(pre_tokenizer, **options))
    assert written.get_field("tokenizer.ggml.pre").contents() == name


@pytest.mark.parametrize("space", [True, False])
def test_a_text_becomes_the_same_pieces_of_sentencepiece(space, make_case):
    written = assert_same_tokens(make_case, sentencepiece(space=space))
    assert written.get_field("tokenizer.ggml.model").contents() == "llama"
    assert written.get_field("tokenizer.ggml.add_space_prefix").contents() == space


def test_a_first_token_that_tokenizer_and_template_both_write_is_there_once(make_case):
    """As Llama 3's."""
    tokenizer = with_turns(byte_tokenizer().backend_tokenizer, bos_token="<|begin|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    for template, adds in (("{{ bos_token }}" + CHATML, True), (CHATML, False)):
        tokenizer.chat_template = template
        assert begins_with_bos(tokenizer) == adds
        assert_same_tokens(make_case, tokenizer)


def test_a_cut_that_llama_cpp_is_told_wrongly_is_seen(make_case, monkeypatch):
    """SmolLM2's own file cuts before digits, and the tokenizer that transformers makes of it does not."""
    case = make_case("llama", learned(CUTS["gpt-2"][0]))
    monkeypatch.setattr("qriemann.gguf.vocabulary._pre_tokenizer", lambda core: "smollm")
    (first, *_) = case.run(case.write_base(), None, talk=True).retold
    assert first.startswith("llama.cpp makes other tokens of '  two  spaces")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: learned(split(r"\s+|\S+")), "llama.cpp has no name for how the tokenizer cuts"),
        (lambda: learned(pre_tokenizers.ByteLevel(add_prefix_space=True)), "llama.cpp has no name for how"),
        (word_tokenizer, "must be byte-pair encoding to become GGUF, got WordLevel"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tokenizer, message):
    with pytest.raises(InputError, match=message):
        write_vocabulary(gguf.GGUFWriter(None, "llama"), tokenizer(), 500)


def test_more_tokens_than_rows_of_embeddings_are_refused():
    with pytest.raises(InputError, match="100 rows of embeddings for the tokenizer's 267 tokens"):
        write_vocabulary(gguf.GGUFWriter(None, "llama"), byte_tokenizer(), 100)
