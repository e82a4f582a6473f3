"""Token ids and labels for a stock `SFTTrainer`, from the row formats that people have.

`SFTTrainer` takes a dataset that already has `input_ids` and `labels` as it is (it still truncates and packs), so the mask is
decided here, on every row, before anything is written. A row that cannot be trained on is an error that names it, never a row
that silently contributes nothing.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qriemann.data.chat_mask import AssistantTokenizer, Example, Message, RowError
from qriemann.data.sources import Source
from qriemann.errors import InputError

IGNORED = -100
_SHOWN_ROWS = 3
_ACCEPTED = (
    "messages (role, content), prompt and completion, conversations (from, value), instruction and output (Alpaca), "
    "text, or input_ids and labels"
)
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass
class TokenizedData:
    """What the trainer trains on.

    Attributes:
        train, held_out: `input_ids` and `labels`, -100 where a token is not trained.
        row_format: the columns that were recognized.
        notices: one line for everything that a person should know about their rows.
    """

    train: Dataset
    held_out: Dataset | None
    row_format: str
    notices: list[str] = field(default_factory=list)


def prepare(
    train: Source,
    held_out: Source | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: str = "assistant",
    text_field: str = "text",
    max_length: int | None = None,
    eval_size: float = 0.0,
    seed: int = 0,
    num_proc: int | None = None,
    max_held_out: int | None = None,
    allow_untrained: bool = False,
) -> TokenizedData:
    """Tokens and labels of the training rows and the held-out ones.

    Args:
        train: rows in any accepted format.
        held_out: likewise; None to take `eval_size` of the training rows.
        tokenizer: with a chat template, if the rows are conversations.
        loss_on: "assistant" or "all" tokens.
        text_field: the column of plain texts.
        max_length: in tokens; rows with nothing to train before it are dropped, with a notice. None for no limit.
        eval_size: the share (below 1) or the number of training rows to hold out; 0 for none.
        seed: of the choice of held-out rows.
        num_proc: processes that tokenize.
        max_held_out: upper bound of the rows that a share `eval_size` holds out.
        allow_untrained: leave rows without a trained token out, with a notice, instead of refusing them.

    Raises:
        InputError: for rows without usable columns, an empty turn, a row with no trained token, a template that does not fit.
    """
    notices: list[str] = []
    row_format = recognize(train, text_field)
    options = (loss_on, text_field, max_length, num_proc, notices, allow_untrained)
    tokens = _tokenize(train, tokenizer, *options)
    if held_out is not None:
        kept = _tokenize(held_out, tokenizer, *options)
        return TokenizedData(_without_numbers(tokens), _without_numbers(kept), row_format, notices)
    # A conversation that became several rows is held out whole.
    by_row: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(tokens["row"]):
        by_row[number].append(index)
    tokens, members = _without_numbers(tokens), list(by_row.values())
    count = round(eval_size * len(members)) if eval_size < 1 else int(eval_size)
    count = max(count, 1) if eval_size > 0 else 0
    count = min(count, max_held_out) if max_held_out is not None and eval_size < 1 else count
    if count == 0:
        return TokenizedData(tokens, None, row_format, notices)
    if count >= len(members):
        raise InputError(
            f"eval_size must leave at least one of the {len(members)} rows of {train.name} to train on, got {eval_size:g}; "
            "lower it, or set eval_size: 0"
        )
    parts = Dataset.from_dict({"member": range(len(members))}).train_test_split(test_size=count, seed=seed)
    trained, kept = (
        tokens.select([index for member in parts[name]["member"] for index in members[member]])
        for name in ("train", "test")
    )
    notices.append(f"{count} of {len(members)} rows of {train.name} are held out (eval_size {eval_size:g})")
    return TokenizedData(trained, kept, row_format, notices)


def recognize(source: Source, text_field: str = "text") -> str:
    """The name of the row format, from the columns.

    Raises:
        InputError: naming the columns found and those accepted.
    """
    # datasets loses such a name on its way through Arrow and then fails on the rows.
    if "\\x00" in repr(source.rows.features):
        raise InputError(f"{source.name} must have keys without NUL characters, got one that has; rename it")
    columns = set(source.rows.column_names)
    # Alpaca comes before text: its copies on the Hub carry the rendered prompt in a text column as well.
    for name, needed in (
        ("input_ids", {"input_ids", "labels"}),
        ("messages", {"messages"}),
        ("prompt-completion", {"prompt", "completion"}),
        ("conversations", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("text", {text_field}),
    ):
        if needed <= columns:
            return name
    raise InputError(
        f"{source.name} must have usable columns, got {', '.join(sorted(columns)) or 'none'}; accepted are {_ACCEPTED}"
    )


def fingerprint(*datasets: Dataset | None) -> str:
    """SHA-256 over the token ids and labels of the datasets, in order, whatever file they came from."""
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(b"dataset")
        if dataset is None:
            continue
        for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
            for name in ("input_ids", "labels"):
                for chunk in batch.column(name).chunks:
                    digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
                    digest.update(chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def trained_token_count(dataset: Dataset) -> int:
    """Number of tokens with a label."""
    return sum(int((np.asarray(labels) != IGNORED).sum()) for labels in _label_rows(dataset))


def token_count(dataset: Dataset) -> int:
    """Number of tokens, with a label or without."""
    return sum(map(len, _label_rows(dataset)))


def _label_rows(dataset: Dataset) -> Iterator[np.ndarray]:
    for batch in dataset.select_columns(["labels"]).with_format("numpy").iter(batch_size=1000):
        yield from batch["labels"]


def _tokenize(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    loss_on: str,
    text_field: str,
    max_length: int | None,
    num_proc: int | None,
    notices: list[str],
    allow_untrained: bool,
) -> Dataset:
    row_format = recognize(source, text_field)
    if row_format == "input_ids":
        given = len(source.rows)
        examples = source.rows.select_columns(["input_ids", "labels"]).add_column("problem", [""] * given)
        examples = examples.add_column("straddles", [False] * given).add_column("row", list(range(given)))
    else:
        chat = row_format in ("messages", "conversations") or (
            row_format == "prompt-completion" and not isinstance(source.rows[0]["prompt"], str)
        )
        if chat and not tokenizer.chat_template:
            raise InputError(
                f"{source.name} holds conversations and must have a chat template, got a tokenizer without one; name a "
                "template or a model that has one with chat_template_path"
            )
        if row_format == "text" and loss_on == "assistant":
            notices.append(f"{source.name} has texts without roles: every token is trained")
        examples = source.rows.map(
            _examples,
            with_indices=True,
            batched=True,
            fn_kwargs={"convert": _row_converter(row_format, tokenizer, loss_on, text_field)},
            remove_columns=source.rows.column_names,
            num_proc=num_proc,
            load_from_cache_file=False,
            desc=f"Tokenizing {source.name}",
        )
    _raise_first_problem(source, examples)
    straddling = sum(examples["straddles"])
    if straddling:
        notices.append(
            f"{straddling} of {len(examples)} rows of {source.name} start a turn inside a token of the prompt; that token is "
            "trained"
        )
    parts = Counter(examples["row"])
    split = sum(count > 1 for count in parts.values())
    if split:
        notices.append(
            f"{split} of {len(parts)} rows of {source.name} become one for each answer, {len(examples)} in all: the chat "
            "template rewrites what came before"
        )
    examples = examples.select_columns(["input_ids", "labels", "row"])
    return _drop_untrained(source, examples, max_length, notices, allow_untrained)


def _without_numbers(examples: Dataset) -> Dataset:
    return examples.select_columns(["input_ids", "labels"])


def _drop_untrained(
    source: Source, examples: Dataset, max_length: int | None, notices: list[str], allow_untrained: bool
) -> Dataset:
    """The rows with a trained token; raises if a row never had one, gives notice of those that truncation leaves bare."""
    bare, cut, truncated = [], [], 0
    numbers = examples["row"]
    for index, labels in enumerate(_label_rows(examples)):
        # The first label is never predicted: nothing comes before it.
        (trained,) = np.nonzero(labels[1:] != IGNORED)
        if trained.size == 0:
            bare.append(index)
        elif max_length is not None and trained[0] + 1 >= max_length:
            cut.append(index)
        truncated += max_length is not None and len(labels) > max_length
    if bare and (not allow_untrained or len(bare) == len(examples)):
        raise InputError(
            f"every row of {source.name} must have a token to train on, got {len(bare)} of {len(examples)} rows with every "
            f"token masked: {_rows(numbers[i] for i in bare)}; remove them, set loss_on: all, or --allow no-trained-token to "
            "leave them out"
        )
    if len(cut) == len(examples):
        raise InputError(
            f"{source.name} must have tokens to train on within max_length {max_length}, got every token masked in all "
            f"{len(cut)} rows; raise max_length"
        )
    if truncated:
        notices.append(f"{truncated} of {len(examples)} rows of {source.name} are cut at max_length {max_length}")
    if bare:
        notices.append(f"{len(bare)} of {len(examples)} rows of {source.name} have no trained token and are left out")
    if not cut and not bare:
        return examples
    if cut:
        notices.append(
            f"{len(cut)} of {len(examples)} rows of {source.name} have no trained token within max_length {max_length} and "
            f"are left out: {_rows(numbers[i] for i in cut)}"
        )
    dropped = {*cut, *bare}
    return examples.select([index for index in range(len(examples)) if index not in dropped])


def _raise_first_problem(source: Source, examples: Dataset) -> None:
    found = zip(examples["row"], examples["problem"], strict=True)
    problems = [(number, problem) for number, problem in found if problem]
    if not problems:
        return
    first = problems[0][1]
    rule, remedy = json.loads(first)
    same = [index for index, problem in problems if problem == first]
    raise InputError(f"every row of {source.name} must have {rule}, got {_rows(same)}; {remedy}")


def _rows(indices: Iterable[int]) -> str:
    """ "row 3" or "rows 3, 4, 9 and 20 more", counted from 1 as an editor counts lines."""
    numbers = [index + 1 for index in indices]
    shown = ", ".join(map(str, numbers[:_SHOWN_ROWS]))
    more = f" and {len(numbers) - _SHOWN_ROWS} more" if len(numbers) > _SHOWN_ROWS else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _examples(
    rows: dict[str, list[Any]], numbers: list[int], convert: Callable[[dict[str, Any]], list[Example]]
) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {"input_ids": [], "labels": [], "problem": [], "straddles": [], "row": []}
    for place, number in enumerate(numbers):
        problem = ""
        try:
            examples = convert({key: column[place] for key, column in rows.items()})
        except RowError as error:
            examples, problem = [([0], [True], False)], json.dumps(error.args)
        for ids, mask, straddles in examples:
            labels = [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]
            for key, value in zip(made, (ids, labels, problem, straddles, number), strict=True):
                made[key].append(value)
    return made


def _row_converter(
    row_format: str, tokenizer: PreTrainedTokenizerBase, loss_on: str, text_field: str
) -> Callable[[dict[str, Any]], list[Example]]:
    encoder = AssistantTokenizer(tokenizer)

    def conversation(row: dict[str, Any], messages: list[Message], first_trained: int = 0) -> list[Example]:
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) and row["tools"] else row.get("tools")
        options = {"tools": tools or None, "template_kwargs": row.get("chat_template_kwargs")}
        if loss_on == "all":
            return [encoder.whole_conversation(messages, **options)]
        return encoder.conversations(messages, first_trained=first_trained, **options)

    def convert(row: dict[str, Any]) -> list[Example]:
        if row_format in ("messages", "conversations"):
            return conversation(row, _messages(row[row_format]))
        if row_format == "alpaca":
            question, answer = _alpaca(row)
            if tokenizer.chat_template:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                return conversation(row, turns)
            return [_plain(encoder, question + "\n\n", answer, loss_on)]
        if row_format == "prompt-completion":
            if not isinstance(row["prompt"], list):
                return [_plain(encoder, _string(row, "prompt"), _string(row, "completion"), loss_on)]
            prompt = _messages(row["prompt"])
            return conversation(row, prompt + _messages(row["completion"]), first_trained=len(prompt))
        text = _string(row, text_field)
        if not text.strip():
            raise RowError("some text", "remove the empty rows")
        return [encoder.text(text)]

    return convert


def _plain(encoder: AssistantTokenizer, prompt: str, completion: str, loss_on: str) -> Example:
    if not completion.strip():
        raise RowError("an assistant turn that is not empty (the completion is)", "fill it or remove the row")
    ids, mask, straddles = encoder.completion(prompt, completion)
    return (ids, [True] * len(ids), False) if loss_on == "all" else (ids, mask, straddles)


def _alpaca(row: dict[str, Any]) -> tuple[str, str]:
    question, context, answer = (_string(row, key) for key in ("instruction", "input", "output"))
    if not answer.strip():
        raise RowError("an assistant turn that is not empty (the output is)", "fill it or remove the row")
    return (f"{question.strip()}\n\n{context.strip()}" if context.strip() else question.strip()), answer


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    # A CSV column of numbers is read as numbers.
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str | None):
        raise RowError(f"a string in {key}", f"write a string instead of a {type(value).__name__}")
    return value or ""


def _messages(turns: Any) -> list[Message]:
    """role and content of every turn, from TRL's or ShareGPT's keys; keys that other rows brought along are left out."""
    if not isinstance(turns, list) or not turns:
        raise RowError("a list of turns that is not empty", "fill it or remove the row")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowError(
                f"turns with a role and a content (turn {number} is a {type(turn).__name__})", "rewrite that turn"
            )
        message = {key: value for key, value in turn.items() if value is not None and key not in ("from", "value")}
        written = turn.get("role") or turn.get("from")
        role = _ROLES.get(str(written).lower())
        if role is None:
            raise RowError(
                f"roles among {', '.join(sorted(_ROLES))} (turn {number} has {written!r})", "rename that role"
            )
        content = _content(turn)
        if role == "assistant" and not content.strip() and not turn.get("tool_calls"):
            raise RowError("no empty assistant turn", "fill the turn or remove the row")
        messages.append({**message, "role": role, "content": content})
    return messages


def _content(turn: dict[str, Any]) -> str:
    """The text of a turn; the text parts of a list of parts, joined."""
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):
        kinds = {part.get("type", "text") for part in content if isinstance(part, dict)}
        if kinds - {"text"}:
            raise RowError(f"turns of text (a part is {', '.join(sorted(kinds - {'text'}))})", "remove the row")
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return _string({"content": content}, "content")
