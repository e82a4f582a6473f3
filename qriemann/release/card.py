"""The model card: README.md of an adapter or a merged model, with what the training recorded about it.

What a person wrote into the card stays: only the part between two marks is ours, and the fields of the metadata that we know.
The card that PEFT and the Trainer leave, mostly headings with nothing under them, is replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from qriemann.folder.contents import CURVE, ModelFolder, is_hub_id, proof_rows
from qriemann.folder.private import without_paths

CARD = "README.md"
_BEGIN, _END = "<!-- begin: written by qriemann -->", "<!-- end: written by qriemann -->"
_OURS = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
# Sentences of the cards that PEFT, transformers and TRL write beside a model.
_UPSTREAM = (
    "[More Information Needed]",
    "This model card has been generated automatically according to the information the Trainer had access to",
    "It has been trained using [TRL]",
)


def write_card(found: ModelFolder, text: str | None = None) -> Path:
    """Writes the card into the folder, in one move, and returns its path.

    Args:
        found: the folder.
        text: the card; None makes it.
    """
    path, partial = found.path / CARD, found.path / f".{CARD}.{os.getpid()}.tmp"
    try:
        partial.write_text(make_card(found) if text is None else text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def make_card(
    found: ModelFolder,
    *,
    repo: str | None = None,
    base_id: str | None = None,
    license: Mapping[str, str] | None = None,
) -> str:
    """The card's text; what this project writes into it names no place on this machine.

    Args:
        found: the folder; a card that it holds already keeps what a person wrote into it.
        repo: Hub id under which the card will stand.
        base_id: Hub id of the base; None takes the recorded base if that is one.
        license: of the base, under the keys of a card's metadata; one that a person wrote into the card stays.
    """
    if base_id is None and found.base is not None and is_hub_id(found.base):
        base_id = found.base
    ours = f"{_BEGIN}\n\n{_body(found, base_id, repo)}\n\n{_END}"
    text, data = _written_by_a_person(found.path / CARD)
    text = (
        _OURS.sub(lambda _: ours, text) if _OURS.search(text) else f"{text.strip()}\n\n{ours}" if text.strip() else ours
    )
    known = {key: value for key, value in _metadata(found, base_id).items() if value}
    tags = [*data.pop("tags", []), *known.pop("tags")]
    merged = ModelCardData(**{**(license or {}), **data, **known, "tags": list(dict.fromkeys(tags))})
    return f"---\n{merged.to_yaml()}\n---\n\n{text.strip()}\n"


def _written_by_a_person(path: Path) -> tuple[str, dict[str, Any]]:
    """The body and the metadata of an existing card, unless a tool wrote it."""
    try:
        content = path.read_text(encoding="utf-8")
        if any(sentence in content for sentence in _UPSTREAM) and not _OURS.search(content):
            return "", {}
        card = ModelCard(content)
    # A card that cannot be read as one; the Hub would not take it either.
    except (OSError, ValueError, yaml.YAMLError):
        return "", {}
    data = card.data.to_dict()
    # Of a list the Hub makes links; a card may hold a single word.
    data["tags"] = [data["tags"]] if isinstance(data.get("tags"), str) else list(data.get("tags") or [])
    return card.text, data


def _metadata(found: ModelFolder, base_id: str | None) -> dict[str, Any]:
    adapter = found.kind == "adapter"
    dataset = found.settings.get("dataset_name")
    return {
        "base_model": base_id,
        "base_model_relation": ("adapter" if adapter else "finetune") if base_id else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qriemann", "lora", "sft", *filter(None, [found.settings.get("method")])],
        "datasets": [dataset] if dataset and is_hub_id(dataset) else None,
    }


def _body(found: ModelFolder, base_id: str | None, repo: str | None) -> str:
    base = base_id or (found.base and Path(found.base).name) or "an unnamed base"
    parts = [
        f"# {base.rpartition('/')[2]}, fine-tuned",
        _summary(found, base),
        _use(found, repo or "PATH_TO_THIS_FOLDER") if base_id else "",
        _results(found),
        f"![training and held-out loss]({CURVE})" if found.curve is not None else "",
        _answers(found),
        _proof(found),
        _training(found, base_id),
    ]
    return "\n\n".join(part for part in parts if part)


def _summary(found: ModelFolder, base: str) -> str:
    method = f" by {found.settings['method']}" if "method" in found.settings else ""
    frozen = " in 4 bit (NF4)" if found.settings.get("quantize") == "nf4" else ""
    if found.kind == "adapter":
        rank = f" of rank {found.config['r']}" if "r" in found.config else ""
        return f"A LoRA adapter{rank} for `{base}`, trained{method} on the frozen base{frozen}. Any PEFT loads it."
    into = f" ({found.proof['into']})" if "into" in found.proof else ""
    return f"`{base}` with a LoRA adapter, trained{method} on the frozen base{frozen}, merged into its weights{into}."


def _use(found: ModelFolder, repo: str) -> str:
    library, loader = {
        "adapter": ("peft", "AutoPeftModelForCausalLM"),
        "model": ("transformers", "AutoModelForCausalLM"),
    }.get(found.kind, ("", ""))
    return (
        f'```python\nfrom {library} import {loader}\n\nmodel = {loader}.from_pretrained("{repo}")\n```'
        if library
        else ""
    )


def _results(found: ModelFolder) -> str:
    if not found.scores:
        return ""
    rows = [(name, f"{before:.4g}", f"{after:.4g}") for name, before, after in found.scores]
    count = (found.run.get("data") or {}).get("held_out_rows")
    on = f" on {count} held-out rows" if count else ""
    return f"## Before and after\n\nMeasured{on}.\n\n{_table(('', 'before', 'after'), rows)}"


def _answers(found: ModelFolder) -> str:
    keys = ("question", "right", "before", "after")
    rows = [[sample.get(key, "") for key in keys] for sample in found.samples]
    return _table(("asked", "right answer", "before", "after"), rows) if rows else ""


def _proof(found: ModelFolder) -> str:
    rows = proof_rows(found.proof)
    if not rows:
        return ""
    prompts = found.proof.get("prompts") or {}
    text = (
        "Reloaded and compared with the trained model (4-bit base and adapter) on "
        f"{prompts.get('tokens', '?')} tokens of {prompts.get('source', 'unknown rows')}; KL in nats a token; same top: the "
        "share of tokens with the same most likely one; weights: the largest relative difference of a tensor from base plus "
        "adapter."
    )
    remarks = "\n".join(f"- {line}" for line in found.proof.get("conclusions", []))
    return f"## Is it what was trained?\n\n{text}\n\n{_table(rows[0], rows[1:])}\n\n{remarks}".rstrip()


def _training(found: ModelFolder, base_id: str | None) -> str:
    if not found.settings:
        return ""
    names = {found.base: base_id} if found.base and base_id else {}
    settings = without_paths(found.written_settings, names)
    # What a reader has to replace, said by a name that cannot be taken for a real one.
    local_data = found.settings.get("dataset_name") is None or not is_hub_id(found.settings["dataset_name"])
    settings = {
        **{key: value for key, value in settings.items() if key not in ("output_dir", "push", "push_to_hub", "resume")},
        **({"model_name_or_path": base_id or Path(found.base).name} if found.base else {}),
        **({"dataset_name": Path(settings.get("dataset_name") or "YOUR_ROWS.jsonl").name} if local_data else {}),
    }
    data, versions = found.run.get("data") or {}, found.run.get("versions") or {}
    facts = [
        ("data", f"{data.get('train_rows')} rows, {data.get('trained_tokens')} trained tokens" if data else ""),
        ("fingerprint of the tokens (SHA-256)", f"`{data['fingerprint']}`" if "fingerprint" in data else ""),
        ("speed", f"{found.result['tokens_per_s']:.0f} tokens/s" if found.result.get("tokens_per_s") else ""),
        ("peak memory", f"{found.result['peak_gib']:.2f} GiB" if found.result.get("peak_gib") else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    recipe = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()
    private = " The rows are not published: put your own in their place." if local_data else ""
    return "\n\n".join(
        [
            "## Training",
            _table(("", ""), [fact for fact in facts if fact[1]]),
            f"To train it again, put this into `run.yaml`.{private}",
            f"```yaml\n{recipe}\n```",
            "```bash\nqriemann train run.yaml --output_dir out\n```",
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(str(cell)) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    # An answer may hold anything, and a table row is one line.
    text = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(text.splitlines())
