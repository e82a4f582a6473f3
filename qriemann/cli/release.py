"""The commands on what a training left: merge, export, eval, inspect, chat, report, push."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qriemann.cli.parser import Commands, arg
from qriemann.errors import InputError
from qriemann.folder.files import check_exists, check_output

COMMANDS = Commands()
_BASE = arg("--base", metavar="MODEL", help="instead of the base that the adapter names")
_QUANTIZE = arg("--quantize", choices=["nf4", "none"], help="of the base (default: as the adapter was trained)")
# What merge and export take.
_PROVED = (
    arg("adapter", metavar="ADAPTER", help="a folder with a plain LoRA adapter, whoever trained it"),
    arg("out", metavar="OUT", help="what is written: a new folder"),
    _BASE,
    arg("--revision", metavar="REV", help="of a base on the Hub"),
    _QUANTIZE,
    arg("--data", metavar="FILE", help="held-out rows for the proof (default: 32 built-in prompts)"),
    arg("--max-kl", type=float, metavar="X", help="largest mean KL that is accepted, nats a token"),
)


@COMMANDS.add(
    "merge",
    "write base and adapter as one model, and prove that it is what was trained (3 if not)",
    *_PROVED,
    arg(
        "--into",
        nargs="+",
        metavar="BASE",
        help="nf4-dequantized, original, nf4; several give a subfolder each (default: what the adapter was trained on, the "
        "first or the second)",
    ),
    arg("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: float32, or as stored)"),
)
def _merge(**given: Any) -> int:
    _check_paths(given)
    with _loading() as console:
        from qriemann.release.merge import merge

    return _released(merge(console=console, **given))


@COMMANDS.add(
    "export",
    "write a smaller adapter, or GGUF files, and prove that they are it (3 if not)",
    *_PROVED,
    arg("--rank", type=int, metavar="R", help="a smaller adapter: the rank of every layer that has more"),
    arg(
        "--to",
        choices=["gguf", "gguf-adapter"],
        help="for llama.cpp and Ollama: the merged model, or the adapter for --lora",
    ),
    arg(
        "--type",
        metavar="TYPES",
        help="of the merged GGUF files, with commas between: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 "
        "(default: q8_0,q4_0)",
    ),
)
def _export(rank: int | None, to: Any, type: str | None, **given: Any) -> int:
    if (rank is None) == (to is None):
        raise InputError("export needs either --rank R or --to; see qriemann export --help")
    if type is not None and to != "gguf":
        raise InputError("--type goes with --to gguf; remove it")
    _check_paths(given)
    with _loading() as console:
        from qriemann.release.export import export
        from qriemann.release.export_gguf import export_gguf

    if rank is not None:
        return _released(export(rank=rank, console=console, **given))
    if type is not None:
        given["types"] = [name.strip() for name in type.split(",") if name.strip()]
    return _released(export_gguf(to=to, console=console, **given))


def _check_paths(given: dict[str, Any]) -> None:
    check_exists(given["adapter"], "the adapter")
    if given["data"] is not None:
        check_exists(given["data"], "--data")
    check_output(Path(given["out"]).expanduser())


@contextmanager
def _loading() -> Iterator[Any]:
    """Says that torch is being loaded while the block imports it; gives the console for what comes then."""
    from qriemann.training.display import make_view

    view = make_view("auto")
    with view.doing("loading torch and transformers"):
        yield view.console


def _released(result: Any) -> int:
    if result.accepted:
        print(result.folder)
        return 0
    print(f"qriemann: the proof failed; what was written is left in {result.folder}", file=sys.stderr)
    return 3


@COMMANDS.add(
    "eval",
    "loss, perplexity and right answers on held-out rows, with 95-percent intervals",
    arg("model", metavar="DIR", help="an adapter's folder, a model's folder, a Hub id or a .gguf file"),
    arg("other", nargs="?", metavar="DIR2", help="a second one, compared row by row"),
    arg("data", metavar="DATA", help="the rows, of which those with an `answer` are answered"),
    arg(
        "--scorer",
        default="exact",
        metavar="NAME",
        help="when an answer is right: exact (default), last-number, choice, contains, reasoning-gym",
    ),
    _BASE,
    _QUANTIZE,
    arg("--max-rows", type=int, metavar="N", help="the first N rows"),
    arg("--output", metavar="FILE", help="write the figures and answers there, as JSON"),
)
def _eval(data: str, output: str | None, **given: Any) -> None:
    check_exists(data, "the rows")
    with _loading() as console:
        from qriemann.evaluation.evaluate import as_dict, evaluate

    found = evaluate(data=data, console=console, **given)
    if output:
        with open(output, "w", encoding="utf-8") as file:
            json.dump([as_dict(evaluation) for evaluation in found], file, indent=2, default=str)


@COMMANDS.add(
    "inspect",
    "what an adapter does to each layer: singular values, ranks, norms",
    arg("adapter", metavar="DIR", help="an adapter's folder"),
    _BASE,
    arg("--plot", metavar="FILE", help="the picture (default: inspect.png in DIR)"),
    arg("--every-layer", action="store_true", help="a line for every layer instead of every kind"),
)
def _inspect(adapter: str, **given: Any) -> None:
    check_exists(adapter, "the adapter")
    from rich.console import Console

    from qriemann.release.inspect import inspect

    inspect(adapter, console=Console(), **given)


@COMMANDS.add(
    "chat",
    "chat with an adapter or a merged model; /help in it lists what it can do",
    arg("folder", metavar="DIR", help="the adapter or the model; a pipe may ask, one question a line"),
    _BASE,
    _QUANTIZE,
    arg("--system", metavar="TEXT", help="the system prompt"),
)
def _chat(folder: str, **given: Any) -> None:
    check_exists(folder, "the adapter or the model")
    if sys.stdin.isatty():
        print(f"loading {folder} ...", flush=True)
    from qriemann.chat.session import load_session
    from qriemann.chat.terminal import chat

    chat(load_session(folder, **given))


@COMMANDS.add(
    "report",
    "write report.html about a run, an adapter or a merged model",
    arg("folder", metavar="DIR", help="the run's folder, where the page goes too"),
)
def _report(folder: str) -> None:
    check_exists(folder, "the run's folder")
    from qriemann.release.report import write_report

    print(write_report(folder))


@COMMANDS.add(
    "push",
    "upload an adapter or a merged model to the Hub, with its card",
    arg("folder", metavar="DIR", help="the adapter or the model"),
    arg("repo", metavar="OWNER/NAME", help="the repository; made if there is none"),
    arg("--private", action="store_const", const=True, help="make it private; refuse one that others can read"),
    arg("--dry-run", action="store_true", help="say what would go up; send and write nothing"),
    arg("--base-id", metavar="OWNER/NAME", help="the base on the Hub, where the adapter names a local one"),
    arg("--run", dest="records", metavar="DIR", help="the training's folder, for a merged model's card"),
)
def _push(folder: str, records: str | None, **given: Any) -> None:
    check_exists(folder, "the adapter or the model")
    from rich.console import Console

    from qriemann.release.push import push

    push(folder, run=records, console=Console(), **given)
