"""The command line: `qriemann COMMAND ...`; every command is a thin call of one library function.

The exit status is 0 for success, 2 for something that the user can mend (one line says what), 3 for a merge or an export
whose proof failed, 130 for Ctrl-C and 143 for SIGTERM; a bug keeps its traceback. torch and TRL are imported after everything
that the command line and the settings alone show to be wrong has been said.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from qriemann.errors import InputError
from qriemann.folder.files import check_exists, check_output
from qriemann.reporting import reporting
from qriemann.upstream import quiet


class _Parser(argparse.ArgumentParser):
    """Bad arguments in one line, as any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        _parser().print_help()
        return 2
    if words[0] == "--version":
        import qriemann

        print(qriemann.__version__)
        return 0
    return reporting(lambda: _run([word for word in words if word != "--debug"]), debug="--debug" in words)


def _run(words: list[str]) -> int:
    parser = _parser()
    # `train`, `plan` and `check` hand `--key value` pairs on to the configuration; other commands refuse unknown arguments.
    known, pairs = parser.parse_known_args(words)
    if pairs and not known.takes_pairs:
        parser.error(f"{known.command} takes no argument {pairs[0]!r}")
    known.pairs = pairs
    return known.run(known) or 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qriemann",
        description="Fine-tunes chat models in 4 bit with an adapter on the manifold of fixed-rank matrices.",
        epilog="--debug after any command shows the traceback of an error.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for add in (
        _add_train,
        _add_plan,
        _add_merge,
        _add_export,
        _add_eval,
        _add_inspect,
        _add_chat,
        _add_report,
        _add_push,
        _add_check,
    ):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str, *, takes_pairs: bool = False
) -> argparse.ArgumentParser:
    """A subparser whose arguments go to `run`; with `takes_pairs`, `--key value` pairs that it does not know come along."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run, takes_pairs=takes_pairs)
    return parser


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", _train, "train an adapter as a YAML file says", takes_pairs=True)
    parser.add_argument("file", nargs="?", metavar="FILE.yaml", help="the settings; --key value overrides them")
    parser.add_argument("--help-keys", action="store_true", help="list this project's keys; SFTConfig's are taken too")


def _train(arguments: argparse.Namespace) -> int:
    if arguments.help_keys:
        from qriemann.config import describe_keys

        for name, default, text in describe_keys():
            print(f"{name:28} {default:16} {text}")
        return 0
    if arguments.file is None:
        raise InputError("train needs a YAML file; see qriemann train --help")
    from qriemann.training.commands import run_training

    return run_training(arguments.file, arguments.pairs)


def _add_plan(commands: Any) -> None:
    text = "say what a run will need, from the model's configuration alone"
    parser = _command(commands, "plan", _plan, text, takes_pairs=True)
    parser.add_argument("file", metavar="FILE.yaml", help="the settings; --key value overrides them")
    parser.add_argument(
        "--vram", type=float, metavar="GIB", help="memory of the card: what fits it, and what to change"
    )
    parser.add_argument("--all-cards", action="store_true", help="the same for the usual sizes of cards")


def _plan(arguments: argparse.Namespace) -> None:
    from qriemann.training.commands import run_plan

    run_plan(arguments.file, arguments.pairs, arguments.vram, all_cards=arguments.all_cards)


def _add_check(commands: Any) -> None:
    text = "look at the rows, and take the longest batch through the model on this machine"
    parser = _command(commands, "check", _check, text, takes_pairs=True)
    parser.add_argument("file", metavar="FILE.yaml", help="the settings; --key value overrides them")
    parser.add_argument("--vram", type=float, metavar="GIB", help="memory to keep to, where the card has more")


def _check(arguments: argparse.Namespace) -> None:
    from qriemann.training.commands import run_check

    run_check(arguments.file, arguments.pairs, arguments.vram)


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        _merge,
        "write base and adapter as one model, and prove that it is what was trained (3 if not)",
    )
    _add_adapter_arguments(parser, "the merged model: a new folder")
    parser.add_argument(
        "--into",
        nargs="+",
        default=["nf4-dequantized"],
        metavar="BASE",
        help="nf4-dequantized (what training saw; the default), original, nf4; several give a subfolder each",
    )
    parser.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: float32, or as stored)")


def _merge(arguments: argparse.Namespace) -> int:
    given = _adapter_arguments(arguments)
    with _loading() as console:
        from qriemann.release.merge import merge

    return _released(merge(into=arguments.into, dtype=arguments.dtype, console=console, **given))


def _add_export(commands: Any) -> None:
    parser = _command(commands, "export", _export, "write a smaller adapter, and prove that it is near (3 if not)")
    _add_adapter_arguments(parser, "the smaller adapter: a new folder")
    parser.add_argument("--rank", type=int, required=True, metavar="R", help="of every layer that has more")


def _export(arguments: argparse.Namespace) -> int:
    given = _adapter_arguments(arguments)
    with _loading() as console:
        from qriemann.release.export import export

    return _released(export(rank=arguments.rank, console=console, **given))


def _add_adapter_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder with a plain LoRA adapter, whoever trained it")
    parser.add_argument("out", metavar="OUT", help=out)
    parser.add_argument("--base", metavar="MODEL", help="instead of the base that the adapter names")
    parser.add_argument("--revision", metavar="REV", help="of a base on the Hub")
    parser.add_argument("--data", metavar="FILE", help="held-out rows for the proof (default: 32 built-in prompts)")
    parser.add_argument("--max-kl", type=float, metavar="X", help="largest mean KL that is accepted, nats a token")


def _adapter_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    check_exists(arguments.adapter, "the adapter")
    if arguments.data is not None:
        check_exists(arguments.data, "--data")
    check_output(Path(arguments.out).expanduser())
    return {name: getattr(arguments, name) for name in ("adapter", "out", "base", "revision", "data", "max_kl")}


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
    parser = _command(
        commands, "eval", _eval, "loss, perplexity and right answers on held-out rows, with 95-percent intervals"
    )
    parser.usage = "qriemann eval DIR [DIR2] DATA [options]\n       qriemann eval DIR [DIR2] --tasks NAME,... [options]"
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="DIR [DIR2] DATA",
        help="an adapter's folder, a model's folder, a Hub id or a .gguf file; a second one, compared row by row; the "
        "rows, of which those with an `answer` are answered",
    )
    parser.add_argument(
        "--scorer",
        metavar="NAME",
        help="when an answer is right: exact (default), last-number, choice, contains, reasoning-gym",
    )
    parser.add_argument(
        "--tasks", metavar="NAME,...", help="instead of rows, tasks of lm-evaluation-harness (pip install lm-eval)"
    )
    parser.add_argument("--base", metavar="MODEL", help="instead of the base that an adapter names")
    parser.add_argument("--max-rows", type=int, metavar="N", help="the first N rows, of each task if there are any")
    parser.add_argument("--output", metavar="FILE", help="write the figures and answers there, as JSON")


def _eval(arguments: argparse.Namespace) -> int:
    paths, tasks, scorer = arguments.paths, arguments.tasks, arguments.scorer
    wanted = (1, 2) if tasks else (2, 3)
    if len(paths) not in wanted or (tasks and scorer):
        raise InputError(
            "eval must be given one or two models and then rows, or --tasks and neither rows nor a scorer, got "
            f"{' '.join(paths)}{' --tasks' if tasks else ''}{' --scorer' if scorer else ''}; see qriemann eval --help"
        )
    if not tasks:
        check_exists(paths[-1], "the rows")
    with _loading() as console:
        from qriemann.evaluation.evaluate import as_dict, evaluate
        from qriemann.evaluation.harness import run_tasks

    options = {"base": arguments.base, "max_rows": arguments.max_rows, "console": console}
    if tasks:
        figures = run_tasks(paths, tasks.split(","), **options)
    else:
        *models, data = paths
        other = models[1] if len(models) == 2 else None
        found = evaluate(models[0], data, other=other, scorer=scorer or "exact", **options)
        figures = [as_dict(evaluation) for evaluation in found]
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2, default=str)
    return 0


def _add_inspect(commands: Any) -> None:
    parser = _command(
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
    parser = _command(
        commands, "chat", _chat, "chat with an adapter or a merged model; /help in it lists what it can do"
    )
    parser.add_argument("folder", metavar="DIR", help="the adapter or the model; a pipe may ask, one question a line")
    parser.add_argument("--base", help="the base model, where not the one that the adapter names")
    parser.add_argument("--quantize", choices=["nf4", "none"], help="of the base; default: as it was trained")
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
    parser = _command(commands, "report", _report, "write report.html about a run, an adapter or a merged model")
    parser.add_argument("folder", metavar="DIR", help="the run's folder, where the page goes too")


def _report(arguments: argparse.Namespace) -> int:
    check_exists(arguments.folder, "the run's folder")
    from qriemann.release.report import write_report

    print(write_report(arguments.folder))
    return 0


def _add_push(commands: Any) -> None:
    parser = _command(commands, "push", _push, "upload an adapter or a merged model to the Hub, with its card")
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


if __name__ == "__main__":
    sys.exit(main())
