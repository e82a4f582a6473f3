"""`export --to`: the adapter, or the model merged with it, as GGUF files for llama.cpp and Ollama, proved by llama.cpp."""

import gc
import importlib.util
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from qriemann.adapters.saved import read_adapter
from qriemann.base.chat_template import end_tokens
from qriemann.base.gguf import EMBEDDED_MODEL, resolve_gguf
from qriemann.errors import InputError, MissingExtraError
from qriemann.evaluation import proof
from qriemann.folder.contents import GGUF_REPORT, read_folder
from qriemann.folder.files import check_output
from qriemann.folder.records import write_json
from qriemann.release.atomic_folder import Released, move_into_place, written_or_nothing
from qriemann.release.card import write_card
from qriemann.upstream import quiet

To = Literal["gguf", "gguf-adapter"]
# Counted tokens that llama.cpp is asked for, one after the other.
_TOKENS = 400


def export_gguf(
    adapter: str | Path,
    out: str | Path,
    *,
    to: To = "gguf",
    types: Sequence[str] = ("q8_0", "q4_0"),
    base: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    data: str | None = None,
    max_kl: float | None = None,
    console: Console | None = None,
) -> Released:
    """Writes GGUF files of what was trained, and proves by llama.cpp that they are it.

    Args:
        adapter: a folder with a plain LoRA adapter.
        out: a folder that is empty or does not exist; its name is the files'.
        to: "gguf" is the model merged with the adapter, one file for each type. "gguf-adapter" is the adapter alone, in
            float32, for llama.cpp's `--lora` on a GGUF file of the base.
        types: of the merged files: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0.
        base, revision, quantize, data, console: as in `merge`.
        max_kl: largest mean KL of a file to the trained model that is accepted, nats a token; None is a tenth of the
            untrained base's.

    Returns:
        The result. It is accepted if llama.cpp computes what was trained and at least one of the types is near enough; a file
        that is not is left under a `.rejected` name. Without the package xllamacpp nothing is judged, and the report says so.

    Raises:
        InputError: as in `merge`, or llama.cpp has no such architecture or tokenizer.
        MissingExtraError: the package gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("writing GGUF files needs the package gguf; pip install 'qriemann[gguf]'")
    from qriemann.gguf import compare, judge
    from qriemann.gguf.architectures import Layout
    from qriemann.gguf.modelfile import make_modelfile
    from qriemann.gguf.write import write_files

    types = _check_arguments(to, types, max_kl)
    console = console or Console(quiet=True)
    out = Path(out).expanduser()
    check_output(out)
    saved = read_adapter(adapter, "export")
    with quiet(), written_or_nothing(out) as partial:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            path = Path(scratch) / "recorded.safetensors"
            trained, rows, recording = proof.load_and_record(
                saved, base, revision, quantize, data, path, console, max_tokens=_TOKENS
            )
            layout, tokenizer = Layout(trained.model), trained.tokenizer
            files = write_files(
                trained, layout, partial, Path(scratch), out.name, types if to == "gguf" else None, console
            )
            content = {**proof.describe(trained, rows, recording.untrained), "to": to}
            stops = tokenizer.convert_ids_to_tokens(end_tokens(tokenizer, trained.model))
            content |= {"stops": stops, "embedded": trained.base == EMBEDDED_MODEL}
            content["asked"] = read_folder(saved.folder).example
            own_base = resolve_gguf(trained.base) if to == "gguf-adapter" else None
            # llama.cpp is about to need the memory.
            del trained
            gc.collect()
            proving = files, layout.architecture, own_base, recording, tokenizer, max_kl, console
            found, verdicts = judge.prove(*proving) if compare.has_engine() else (judge.unproved(files), [])
            content |= found
            content["conclusions"] = judge.conclusions(content)
        kept = [path for path in files.ladder.values() if path.exists()]
        if kept:
            file = min(kept, key=lambda path: path.stat().st_size).name
            (partial / "Modelfile").write_text(
                make_modelfile(file, tokenizer, content["stops"], content["asked"]), "utf-8"
            )
        elif files.adapter is not None and tokenizer.chat_template:
            # llama.cpp would take the template of the base's file.
            (partial / "chat_template.jinja").write_text(tokenizer.chat_template, "utf-8")
        write_json(partial / GGUF_REPORT, content)
        write_card(read_folder(partial))
        folder = move_into_place(partial, out, accepted=content["accepted"])
        if folder.parent.resolve() == saved.folder.resolve():
            # push takes the files along with the adapter, whose card says how to run them.
            write_card(read_folder(saved.folder))
    if content["proved"]:
        console.print(proof.table(content))
    for line in content["conclusions"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return Released(folder, content["accepted"], verdicts, content)


def _check_arguments(to: str, types: Sequence[str], max_kl: float | None) -> list[str]:
    from qriemann.gguf.write import TYPES

    if to not in ("gguf", "gguf-adapter"):
        raise InputError(f"to must be gguf or gguf-adapter, got {to!r}")
    names = [name.lower() for name in types]
    wrong = [name for name in names if name not in TYPES]
    if wrong or not names:
        kind, how = (wrong or [""])[0].upper(), ""
        if re.search(r"^I?Q\d", kind):
            how = f": llama.cpp's own program makes it of an f16 file: llama-quantize NAME-F16.gguf NAME-{kind}.gguf {kind}"
        raise InputError(f"type must be one of {', '.join(TYPES)}, got {wrong[0] if wrong else 'none'}{how}")
    if max_kl is not None and not max_kl >= 0:
        raise InputError(f"max_kl must be a number of nats >= 0, got {max_kl}")
    return list(dict.fromkeys(names))
