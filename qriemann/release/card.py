"""The model card: README.md of an adapter or a merged model, with what the training recorded about it.

What a person wrote stays: ours are the part between two marks and the metadata's fields that we know. The card that PEFT and
the Trainer leave, mostly headings with nothing under them, is replaced.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from qriemann.folder.contents import ModelFolder, is_hub_id, proof_rows
from qriemann.folder.files import replace_text
from qriemann.folder.private import without_paths
from qriemann.release.templates import render_document

CARD = "README.md"
_BEGIN, _END = "<!-- begin: written by qriemann -->", "<!-- end: written by qriemann -->"
_OURS = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
# Sentences of the cards that PEFT, transformers and TRL write beside a model.
_UPSTREAM = (
    "[More Information Needed]",
    "This model card has been generated automatically according to the information the Trainer had access to",
    "It has been trained using [TRL]",
)
_LOADERS = {"adapter": ("peft", "AutoPeftModelForCausalLM"), "model": ("transformers", "AutoModelForCausalLM")}
_LIBRARIES = {"adapter": "peft", "model": "transformers", "gguf": "gguf"}
# Of this machine, or of this run alone.
_NOT_REPEATED = ("output_dir", "push", "push_to_hub", "resume")


def write_card(found: ModelFolder, text: str | None = None) -> Path:
    """Writes the card into the folder and returns its path."""
    path, content = found.path / CARD, make_card(found) if text is None else text
    replace_text(path, content)
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
        base_id: Hub id of the base; None takes the recorded base if that is one.
        license: of the base, under the keys of a card's metadata; one that a person wrote into the card stays.
    """
    if base_id is None and found.base is not None and is_hub_id(found.base):
        base_id = found.base
    ours = f"{_BEGIN}\n\n{_body(found, base_id, repo)}\n\n{_END}"
    text, data = _written_by_a_person(found.path / CARD)
    text = _OURS.sub(lambda _: ours, text) if _OURS.search(text) else f"{text.strip()}\n\n{ours}"
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
    # The Hub makes links of a list; a card may hold a single word.
    data["tags"] = [data["tags"]] if isinstance(data.get("tags"), str) else list(data.get("tags") or [])
    return card.text, data


def _metadata(found: ModelFolder, base_id: str | None) -> dict[str, Any]:
    adapter = found.kind == "adapter" or (found.kind == "gguf" and found.exports[0][1].get("to") == "gguf-adapter")
    dataset = found.settings.get("dataset_name")
    return {
        "base_model": base_id,
        "base_model_relation": ("adapter" if adapter else "finetune") if base_id else None,
        "library_name": _LIBRARIES.get(found.kind),
        "pipeline_tag": "text-generation",
        "tags": ["qriemann", "lora", "sft", *filter(None, [found.exports and "gguf", found.settings.get("method")])],
        "datasets": [dataset] if dataset and is_hub_id(dataset) else None,
    }


def _body(found: ModelFolder, base_id: str | None, repo: str | None) -> str:
    method = f" by {found.settings['method']}" if "method" in found.settings else ""
    frozen = " in 4 bit (NF4)" if found.settings.get("quantize") == "nf4" else ""
    data = found.run.get("data") or {}
    dataset = found.settings.get("dataset_name")
    return render_document(
        "card.md.jinja",
        found=found,
        base=base_id or (found.base and Path(found.base).name) or "an unnamed base",
        how=f"{method} on the frozen base{frozen}",
        loader=_LOADERS.get(found.kind) if base_id else None,
        repo=repo or "PATH_TO_THIS_FOLDER",
        held_out_rows=data.get("held_out_rows"),
        scores=[(name, f"{before:.4g}", f"{after:.4g}") for name, before, after in found.scores],
        proof=proof_rows(found.proof),
        exports=[_export(found, place, report) for place, report in found.exports],
        facts=_facts(found, data),
        recipe=_recipe(found, base_id),
        private_rows=dataset is None or not is_hub_id(dataset),
    ).strip()


def _export(found: ModelFolder, place: Path, report: dict[str, Any]) -> dict[str, Any]:
    """GGUF files: what the template says of them."""
    prefix = "" if place == found.path else f"{place.name}/"
    files = sorted(place.glob("*.gguf"), key=lambda path: path.stat().st_size)
    prompts = report.get("prompts") or {}
    asked = report.get("asked") or []
    return {
        "file": prefix + files[0].name if files else "",
        "adapter": report.get("to") == "gguf-adapter",
        "embedded": report.get("embedded", False),
        "modelfile": prefix + "Modelfile" if (place / "Modelfile").is_file() else "",
        "template": prefix + "chat_template.jinja" if (place / "chat_template.jinja").is_file() else "",
        "ladder": proof_rows(report),
        "asked": asked or [{"role": "user", "content": "Hello"}],
        "example": bool(asked),
        "system": next((shlex.quote(turn["content"]) for turn in asked if turn["role"] == "system"), ""),
        "source": f"{prompts.get('tokens', '?')} tokens of {prompts.get('source', 'unknown rows')}",
        "conclusions": report.get("conclusions", []),
    }


def _facts(found: ModelFolder, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = found.run.get("versions") or {}
    facts = [
        ("data", f"{data.get('train_rows')} rows, {data.get('trained_tokens')} trained tokens" if data else ""),
        ("fingerprint of the tokens (SHA-256)", f"`{data['fingerprint']}`" if "fingerprint" in data else ""),
        ("speed", f"{found.result['tokens_per_s']:.0f} tokens/s" if found.result.get("tokens_per_s") else ""),
        ("peak memory", f"{found.result['peak_gib']:.2f} GiB" if found.result.get("peak_gib") else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [fact for fact in facts if fact[1]]


def _recipe(found: ModelFolder, base_id: str | None) -> str:
    """The settings that the user wrote, as YAML for another machine; empty without a run."""
    if not found.settings:
        return ""
    settings = without_paths(found.written_settings, {found.base: base_id} if found.base and base_id else {})
    settings = {key: value for key, value in settings.items() if key not in _NOT_REPEATED}
    if found.base:
        settings["model_name_or_path"] = base_id or Path(found.base).name
    # What a reader has to replace has a name that cannot be taken for a real one.
    settings["dataset_name"] = settings.get("dataset_name") or "YOUR_ROWS.jsonl"
    if not is_hub_id(settings["dataset_name"]):
        settings["dataset_name"] = Path(settings["dataset_name"]).name
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()
