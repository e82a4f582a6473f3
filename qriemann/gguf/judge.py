"""The verdict on GGUF files, and the ladder of their types.

Does llama.cpp compute what was trained? That is asked of a file that rounds nothing: a wrongly permuted layer is lost in the
noise of a 4-bit file. And what does each smaller type cost? That is the ladder.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from transformers import PreTrainedTokenizerBase

from qriemann.evaluation import proof
from qriemann.evaluation.proof import Candidate, Recording, Verdict
from qriemann.gguf import compare
from qriemann.gguf.architectures import Architecture
from qriemann.gguf.compare import Seen
from qriemann.gguf.write import Files

# Largest difference of a log-probability in a file that rounds nothing, nats. On the embedded model llama.cpp differs from
# transformers by 3e-4 in float32 and by 0.02 in float16; one layer's k with its rows not permuted, or alpha 5 % too large, by
# 0.7 and more. GELU is a table of float16 numbers there: 2e-3 on models of four layers.
_FAR = {"f32": 0.01, "gelu": 0.05, "f16": 0.1}
# A smaller file is the model if it is within a tenth of what the training changed, or within what float16 rounds.
_KL_SHARE, _KL_FLOOR = 0.1, 1e-3
_PRECISION = {"f32": "float32", "f16": "float16"}
# The weights are judged by what llama.cpp computes with them.
_UNREAD = (0.0, "")


def prove(
    files: Files,
    architecture: Architecture,
    own_base: Path | None,
    recording: Recording,
    tokenizer: PreTrainedTokenizerBase,
    max_kl: float | None,
    console: Console,
) -> tuple[dict[str, Any], list[Verdict]]:
    """The report's part on what llama.cpp found, and the verdict on each file; a file that is too far is renamed."""
    if max_kl is None:
        max_kl = max(_KL_FLOOR, _KL_SHARE * recording.untrained["mean_kl"])
    precision = _PRECISION[files.exact_type]
    bound = _FAR["gelu" if architecture.gelu and files.exact_type == "f32" else files.exact_type]

    def measure(model: Path, adapter: Path | None = None, *, talk: bool = False) -> Seen:
        console.print(f"Running llama.cpp on {model.name} ...", highlight=False)
        return compare.run(model, adapter, recording, tokenizer, talk=talk)

    exact = measure(files.exact, files.adapter, talk=True)
    reasons = compare.far(exact, bound)
    rungs = [
        (Candidate(path, path.name, kind, _UNREAD, max_kl), exact if path == files.exact else measure(path))
        for kind, path in files.ladder.items()
    ]
    if files.adapter is not None:
        rungs.append((Candidate(files.adapter, f"base in {precision}", "float32", _UNREAD, max_kl), exact))
        if own_base is not None:
            named = Candidate(files.adapter, f"base in {own_base.name}", "float32", _UNREAD, float("inf"))
            rungs.append((named, measure(own_base, files.adapter)))
    merged, verdicts = [], []
    for candidate, seen in rungs:
        far = [seen.failure]
        if seen.figures is not None:
            far = proof.far_from_trained(seen.figures, candidate.max_kl, "the trained model")
        verdict = Verdict(candidate, seen.figures, [*reasons, *far])
        verdicts.append(verdict)
        merged.append({**verdict.as_dict(), "bytes": candidate.folder.stat().st_size})
        if far and not reasons and files.adapter is None:
            candidate.folder.rename(candidate.folder.with_name(f"{candidate.folder.name}.rejected"))
    engine = f"llama.cpp in {compare.ENGINE} {importlib.metadata.version(compare.ENGINE)}"
    found = {"dtype": precision, "reasons": reasons, "bound": bound, "asked": exact.asked, "ended": exact.ended}
    found.update(exact.figures or {})
    accepted = any(verdict.accepted for verdict in verdicts)
    return {"proved": True, "engine": engine, "exact": found, "merged": merged, "accepted": accepted}, verdicts


def unproved(files: Files) -> dict[str, Any]:
    """The same where there is no llama.cpp."""
    paths = [path for path in (files.adapter, *files.ladder.values()) if path is not None]
    sizes = [{"into": path.name, "bytes": path.stat().st_size} for path in paths]
    return {"proved": False, "merged": sizes, "accepted": True}


def conclusions(content: dict[str, Any]) -> list[str]:
    """A sentence for each thing to know about the report."""
    if not content["proved"]:
        return [
            "unproved: nothing has run these files; pip install 'qriemann[gguf]' brings llama.cpp, and the same command "
            "proves them"
        ]
    exact, merged = content["exact"], content["merged"]
    if exact["reasons"]:
        return [f"rejected: llama.cpp does not compute what was trained: {reason}" for reason in exact["reasons"]]
    lines = [
        f"{content['engine']} computes what was trained: in {exact['dtype']} a log-probability differs by at most "
        f"{exact['largest_difference']:.1e}, and conversations become the tokens that training had; {exact['ended']} of "
        f"{exact['asked']} answers to the rows ended by themselves within 64 tokens"
    ]
    lines += [f"rejected: {one['into']}: {reason}" for one in merged for reason in one["reasons"]]
    near = [one for one in merged if one["accepted"] and content["to"] == "gguf"]
    if near:
        small = min(near, key=lambda one: one["bytes"])
        lines.append(
            f"the smallest of these files that is still the model: {small['into']}, {decimal(small['bytes'])}, mean KL "
            f"{small['mean_kl']:.2g} nats a token"
        )
    if len(merged) == 2 and not near and merged[1].get("mean_kl", 0) > _KL_SHARE * content["untrained_base"]["mean_kl"]:
        lines.append(
            "the adapter was trained on the base in 4 bit (NF4), and on another file of the base it is farther from the "
            "trained model; the merged file, --to gguf, is the model itself"
        )
    return lines
