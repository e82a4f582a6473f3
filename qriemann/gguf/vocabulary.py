"""The tokenizer of the training as a GGUF file holds it: the one that the rows went through.

A publisher's GGUF file of the base may have another: transformers reads some otherwise than llama.cpp does (SmolLM2's splits
two spaces before a digit into two tokens in transformers, into one in llama.cpp), and the model has learned what it was fed.
"""

import json
import re
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from qriemann.base.chat_template import end_of_turn
from qriemann.errors import InputError
from qriemann.gguf.architectures import CONVERT

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a byte-level tokenizer cuts a text before it merges, and whether whole words bypass the merges: llama.cpp's name for it.
# Its names stand for code; there is no other way to tell it.
_PRE: dict[tuple[tuple[tuple[str, Any], ...], bool], str] = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", _WORDS + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)), True): "llama-bpe",
    ((("Split", _WORDS + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)), False): "dbrx",
    ((("Split", _WORDS + r"\p{N}" + _REST), ("ByteLevel", False)), False): "qwen2",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Writes tokens, merges, special tokens and chat template."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core["model"]
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer must be byte-pair encoding to become GGUF, got {model['type']}")
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(tokens) >= size:
        raise InputError(f"the base has {size} rows of embeddings for the tokenizer's {max(tokens) + 1} tokens")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    sentencepiece = bool(model["byte_fallback"])
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(merges, tokens, size))
        writer.add_add_space_prefix(_adds_a_space(core))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(core))
        writer.add_token_merges(merges)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([_type(tokens.get(index), index, tokenizer, sentencepiece) for index in range(size)])
    for kind in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    end = end_of_turn(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        writer.add_eot_token_id(end)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether llama.cpp has to put the first token before a text; it takes one away that the template writes as well."""
    if tokenizer.bos_token_id is None or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return False
    turn = [{"role": "user", "content": "?"}]
    template = tokenizer.chat_template
    return not template or tokenizer.apply_chat_template(turn, tokenize=False).startswith(tokenizer.bos_token)


def _type(token: str | None, index: int, tokenizer: Any, sentencepiece: bool) -> gguf.TokenType:
    if token is None:
        return gguf.TokenType.UNUSED
    added = tokenizer.added_tokens_decoder.get(index)
    if sentencepiece and index == tokenizer.unk_token_id:
        return gguf.TokenType.UNKNOWN
    if added is not None:
        return gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    if sentencepiece and _BYTE.fullmatch(token):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _scores(merges: list[str], tokens: dict[int, str], size: int) -> list[float]:
    """llama.cpp merges the pair of the highest score first; transformers that of the first merge."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", ""), rank)
    return [-float(first.get(tokens.get(index, ""), len(merges))) for index in range(size)]


def _adds_a_space(core: dict[str, Any]) -> bool:
    parts = [*_parts(core["normalizer"]), *_parts(core["pre_tokenizer"])]
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part["prepend_scheme"] != "never")
        for part in parts
    )


def _pre_tokenizer(core: dict[str, Any]) -> str:
    parts, values = _parts(core["pre_tokenizer"]), {"Digits": "individual_digits", "ByteLevel": "use_regex"}
    how = [
        (part["type"], (part.get("pattern") or {}).get("Regex") or part.get(values.get(part["type"], "")))
        for part in parts
    ]
    name = _PRE.get((tuple(how), bool(core["model"].get("ignore_merges"))))
    normalizers = {part["type"] for part in _parts(core["normalizer"])} - {"NFC"}
    if name is None or normalizers or any(part.get("add_prefix_space") for part in parts):
        raise InputError(
            f"llama.cpp has no name for how the tokenizer cuts a text, {how or 'not at all'!r:.200}; {CONVERT}"
        )
    return name


def _parts(of: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if of is None:
        return []
    steps = of.get("pretokenizers") or of.get("normalizers") or [of]
    return [part for step in steps for part in ([step] if step is of else _parts(step))]
