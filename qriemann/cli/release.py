"""The commands on what a training left: merge, export, eval, inspect, chat, report, push."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qriemann.cli.parser import add_command
from qriemann.errors import InputError
from qriemann.folder.files import check_exists, check_output
from qriemann.upstream import quiet


def add_commands(commands: Any) -> None:
    for add in (_add_merge, _add_export, _add_eval, _add_inspect, _add_chat, _add_report, _add_push):
        add(commands)


def _add_merge(commands: Any) -> None:
    parser = add_command(
        commands,
        "merge",
        _merge,
        "write base and adapter as one model, and prove that it is what was trained (3 if not)",
    )
    _add_adapter_arguments(parser, "the merged model: a new folder")
    parser.add_argument(
        "--into",
        nargs="+",
        metavar="BASE",
        help="nf4-dequantized, original, nf4; several give a subfolder each (default: what the adapter was trained on, the "
        "first or the second)",
    )
    parser.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: float32, or as stored)")


def _merge(arguments: argparse.Namespace) -> int:
    given = _adapter_arguments(arguments)
    with _loading() as console:
        from qriemann.release.merge import merge

    return _released(merge(into=arguments.into, dtype=arguments.dtype, console=console, **given))


def _add_export(commands: Any) -> None:
    parser = add_command(
        commands, "export", _export, "write a smaller adapter, or GGUF files, and prove that they are it (3 if not)"
    )
    _add_adapter_arguments(parser, "what is written: a new folder")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--rank", type=int, metavar="R", help="a smaller adapter: the rank of every layer that has more")
    form.add_argument(
        "--to",
        choices=["gguf", "gguf-adapter"],
        help="for llama.cpp and Ollama: the merged model, or the adapter for --lora",
    )
    parser.add_argument(
        "--type",
        metavar="TYPES",
        help="of the merged GGUF files, with commas between: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 "
        "(default: q8_0,q4_0)",
    )


def _export(arguments: argparse.Namespace) -> int:
    given = _adapter_arguments(arguments)
    if arguments.type is not None and arguments.to != "gguf":
        raise InputError("--type goes with --to gguf; remove it")
    with _loading() as console:
        from qriemann.release.export import export
        from qriemann.release.export_gguf import export_gguf

    if arguments.to is not None:
        if arguments.type is not None:
            given["types"] = [name.strip() for name in arguments.type.split(",") if name.strip()]
        return _released(export_gguf(to=arguments.to, console=console, **given))
    return _released(export(rank=arguments.rank, console=console, **given))


def _add_adapter_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder with a plain LoRA adapter, whoever trained it")
    parser.add_argument("out", metavar="OUT", help=out)
    parser.add_argument("--base", metavar="MODEL", help="instead of the base that the adapter names")
    parser.add_argument("--revision", metavar="REV", help="of a base on the Hub")
    _add_quantize(parser)
    parser.add_argument("--data", metavar="FILE", help="held-out rows for the proof (default: 32 built-in prompts)")
    parser.add_argument("--max-kl", type=float, metavar="X", help="largest mean KL that is accepted, nats a token")


def _adapter_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    check_exists(arguments.adapter, "the adapter")
    if arguments.data is not None:
        check_exists(arguments.data, "--data")
    check_output(Path(arguments.out).expanduser())
    names = ("adapter", "out", "base", "revision", "quantize", "data", "max_kl")
    return {name: getattr(arguments, name) for name in names}


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quantize", choices=["nf4", "none"], help="of the base (default: as the adapter was trained)")


@contextmanager
def _loading() -> Iterator[Any]:
    """Says that torch is being loaded while the block imports it; gives the console for what comes then."""
    from qriemann.training.display import make_view

    view = make_view("auto")
    with quiet(), view.doing("loading torch and transformers"):
        yield view.console


def _released(result: Any) -> int:
    if result.accepted:
        print(result.folder)
        return 0
    print(f"qriemann: the proof failed; what was written is left in {result.folder}", file=sys.stderr)
    return 3


def _add_eval(commands: Any) -> None:
    parser = add_command(
        commands, "eval", _eval, "loss, perplexity and right answers on held-out rows, with 95-percent intervals"
    )
    parser.add_argument("model", metavar="DIR", help="an adapter's folder, a model's folder, a Hub id or a .gguf file")
    parser.add_argument("other", nargs="?", metavar="DIR2", help="a second one, compared row by row")
    parser.add_argument("data", metavar="DATA", help="the rows, of which those with an `answer` are answered")
    parser.add_argument(
        "--scorer",
        default="exact",
        metavar="NAME",
        help="when an answer is right: exact (default), last-number, choice, contains, reasoning-gym",
    )
    parser.add_argument("--base", metavar="MODEL", help="instead of the base that an adapter names")
    _add_quantize(parser)
    parser.add_argument("--max-rows", type=int, metavar="N", help="the first N rows")
    parser.add_argument("--output", metavar="FILE", help="write the figures and answers there, as JSON")


def _eval(arguments: argparse.Namespace) -> int:
    check_exists(arguments.data, "the rows")
    with _loading() as console:
        from qriemann.evaluation.evaluate import as_dict, evaluate

    given = {name: getattr(arguments, name) for name in ("other", "scorer", "base", "quantize", "max_rows")}
    found = evaluate(arguments.model, arguments.data, console=console, **given)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump([as_dict(evaluation) for evaluation in found], file, indent=2, default=str)
    return 0


def _add_inspect(commands: Any) -> None:
    parser = add_command(
        commands, "inspect", _inspect, "what an adapter does to each layer: singular values, ranks, norms"
    )
    parser.add_argument("adapter", metavar="DIR", help="an adapter's folder")
    parser.add_argument("--base", metavar="MODEL", help="instead of the base that the adapter names")
    parser.add_argument("--plot", metavar="FILE", help="the picture (default: inspect.png in DIR)")
    parser.add_argument("--every-layer", action="store_true", help="a line for every layer instead of every kind")


def _inspect(arguments: argparse.Namespace) -> int:
    check_exists(arguments.adapter, "the adapter")
    from rich.console import Console

    from qriemann.release.inspect import inspect

    given = {name: getattr(arguments, name) for name in ("adapter", "base", "plot", "every_layer")}
    inspect(console=Console(), **given)
    return 0


def _add_chat(commands: Any) -> None:
    parser = add_command(
        commands, "chat", _chat, "chat with an adapter or a merged model; /help in it lists what it can do"
    )
    parser.add_argument("folder", metavar="DIR", help="the adapter or the model; a pipe may ask, one question a line")
    parser.add_argument("--base", help="the base model, where not the one that the adapter names")
    _add_quantize(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")


def _chat(arguments: argparse.Namespace) -> int:
    check_exists(arguments.folder, "the adapter or the model")
    if sys.stdin.isatty():
        print(f"loading {arguments.folder} ...", flush=True)
    with quiet():
        from qriemann.chat.session import load_session
        from qriemann.chat.terminal import chat

    chat(load_session(arguments.folder, base=arguments.base, quantize=arguments.quantize, system=arguments.system))
    return 0


def _add_report(commands: Any) -> None:
    parser = add_command(commands, "report", _report, "write report.html about a run, an adapter or a merged model")
    parser.add_argument("folder", metavar="DIR", help="the run's folder, where the page goes too")


def _report(arguments: argparse.Namespace) -> int:
    check_exists(arguments.folder, "the run's folder")
    from qriemann.release.report import write_report

    print(write_report(arguments.folder))
    return 0


def _add_push(commands: Any) -> None:
    parser = add_command(commands, "push", _push, "upload an adapter or a merged model to the Hub, with its card")
    parser.add_argument("folder", metavar="DIR", help="the adapter or the model")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the repository; made if there is none")
    parser.add_argument("--private", action="store_true", help="make it private; refuse one that others can read")
    parser.add_argument("--dry-run", action="store_true", help="say what would go up; send and write nothing")
    parser.add_argument(
        "--base-id", metavar="OWNER/NAME", help="the base on the Hub, where the adapter names a local one"
    )
    parser.add_argument("--run", dest="records", metavar="DIR", help="the training's folder, for a merged model's card")


def _push(arguments: argparse.Namespace) -> int:
    check_exists(arguments.folder, "the adapter or the model")
    from rich.console import Console

    from qriemann.release.push import push

    push(
        arguments.folder,
        arguments.repo,
        private=arguments.private or None,
        dry_run=arguments.dry_run,
        base_id=arguments.base_id,
        run=arguments.records,
        console=Console(),
    )
    return 0
