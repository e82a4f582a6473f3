"""llama.cpp on one GGUF file, in a process of its own: next-token log-probabilities, token ids, answers.

Run as a script: a file that llama.cpp cannot take may end the process, and what it says goes to this process' stderr. The
script does not import this project, so that nothing but llama.cpp computes here.
"""

import itertools
import json
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# Without it, requests to the loopback would go to a proxy that the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Added to the logit of one token. It is then sampled whatever the model says, while the log-probabilities that are returned
# are still the model's: llama.cpp returns none for a sampled token that ends in the middle of a character.
_FORCED = 1e6
# Requests that llama.cpp computes in one pass over the weights.
_SLOTS = 8
# More tokens than any vocabulary has.
_ALL = 2**20


def start(request: dict[str, Any]) -> Any:
    """A server on the file that the request names, with its adapter if there is one."""
    import xllamacpp as engine

    options = engine.CommonParams()
    options.model.path = request["model"]
    if request["lora"]:
        adapter = engine.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = request["lora"], 1.0
        options.lora_adapters = [adapter]
    # Of all slots together.
    options.n_ctx, options.n_parallel, options.kv_unified = request["context"] * _SLOTS, _SLOTS, True
    options.warmup = False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = request["threads"]
    options.use_jinja = True
    # Reasons of a failed load are written at this level and not below.
    options.verbosity = 1
    # Nothing is rounded that the file does not round.
    options.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.cache_type_k = options.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    return engine.Server(options)


def log_probabilities(server: Any, rows: list[dict[str, Any]], forced: int, count: int) -> dict[str, np.ndarray]:
    """Of each counted position of each row: the `count` most likely tokens, their log-probabilities, and the target's.

    A row's prefixes are asked in order, so that each costs one token beyond the cache of the one before.
    """

    def ask(prompt: list[int], number: int) -> dict[int, float]:
        answer = server.handle_completions(
            {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": number, "logit_bias": [[forced, _FORCED]]}
        )
        try:
            found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        except (KeyError, IndexError, TypeError):
            raise SystemExit(f"llama.cpp answered {json.dumps(answer)[:200]}") from None
        return {token["id"]: token["logprob"] for token in found}

    def ask_row(row: dict[str, Any]) -> list[tuple[list[int], list[float], float]]:
        answers = []
        for position, target in zip(row["positions"], row["targets"], strict=True):
            prompt = row["ids"][: position + 1]
            found = ask(prompt, count)
            # An unlikely target is not among them.
            likely = found[target] if target in found else ask(prompt, _ALL)[target]
            answers.append((list(found), list(found.values()), likely))
        return answers

    tokens, values, targets = zip(*itertools.chain.from_iterable(in_slots(ask_row, rows)), strict=True)
    return {"tokens": np.array(tokens), "values": np.array(values), "targets": np.array(targets)}


def in_slots(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """The function of each item, as many at a time as there are slots."""
    with ThreadPoolExecutor(_SLOTS) as pool:
        return list(pool.map(function, items))


def post(server: Any, path: str, **content: Any) -> Any:
    """The answer of llama.cpp's own HTTP interface."""
    headers = {"Content-Type": "application/json"}
    query = urllib.request.Request(server.listening_address + path, json.dumps(content).encode(), headers)
    with _OPENER.open(query, timeout=60) as answer:
        return json.loads(answer.read())


def tokens_of(server: Any, said: str | list[dict[str, str]]) -> list[int]:
    """The token ids of a text, or of a conversation as the file's own template writes it up to the assistant's turn."""
    text = said if isinstance(said, str) else post(server, "/apply-template", messages=said)["prompt"]
    return post(server, "/tokenize", content=text, add_special=text is not said, parse_special=True)["tokens"]


def main(path: str) -> None:
    """Does what the request says and writes the results beside it."""
    request = json.loads(Path(path).read_text("utf-8"))
    server = start(request)

    def ending(prompt: list[int]) -> str:
        # `stop` if the model ended its turn.
        found = server.handle_completions({"prompt": prompt, "n_predict": request["tokens"], "temperature": 0})
        return found["choices"][0]["finish_reason"]

    arrays = log_probabilities(server, request["rows"], request["forced"], request["count"])
    np.savez(Path(path).with_name("values.npz"), **arrays)  # type: ignore[arg-type]
    result = {
        "said": [tokens_of(server, said) for said in request["said"]],
        "endings": in_slots(ending, request["asked"]),
    }
    Path(path).with_name("result.json").write_text(json.dumps(result), "utf-8")
    # It closes its port when nothing holds it any longer.
    server = None


if __name__ == "__main__":
    main(sys.argv[1])
