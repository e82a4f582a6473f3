"""Token ids and labels for a stock `SFTTrainer`, from rows of any accepted format.

`SFTTrainer` leaves a dataset that already has `input_ids` and `labels` as it is, apart from truncation and packing. So the
mask is decided here, for every row, before anything is written. A row without a trained token is an error that names the
row, because it would silently contribute nothing.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qriemann.data.chat_mask import RowError
from qriemann.data.row_formats import FORMATS, RowEncoder, RowFormat, find_format
from qriemann.data.sources import Source
from qriemann.errors import InputError

IGNORED = -100
_SHOWN_ROWS = 3


@dataclass
class TokenizedData:
    """What the trainer trains on.

    Attributes:
        train, held_out: `input_ids` and `labels`, -100 where a token is not trained.
        row_format: the name of the training rows' format.
        notices: what the user should know about the rows, one line each.
    """

    train: Dataset
    held_out: Dataset | None
    row_format: str
    notices: list[str] = field(default_factory=list)


def tokenize_rows(
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
        InputError: rows have no usable columns, an empty turn, no trained token, or turns that the template refuses.
    """
    notices: list[str] = []
    row_format = _recognize(train, text_field).name
    encoder = RowEncoder(tokenizer, loss_on, text_field)

    def tokenize(source: Source) -> Dataset:
        examples = _tokenize(source, tokenizer, encoder, loss_on, num_proc, notices)
        return _drop_untrained(source, examples, max_length, notices, allow_untrained)

    tokens = tokenize(train)
    if held_out is not None:
        return TokenizedData(_without_numbers(tokens), _without_numbers(tokenize(held_out)), row_format, notices)
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


def _recognize(source: Source, text_field: str) -> RowFormat:
    """The format of the rows; raises InputError, naming the columns found and those accepted, if there is none."""
    row_format = find_format(source.rows.column_names, text_field)
    if row_format is None:
        raise InputError(
            f"{source.name} must have usable columns, got {', '.join(sorted(source.rows.column_names)) or 'none'}; accepted "
            f"are {', or '.join(entry.words for entry in FORMATS)}"
        )
    return row_format


def fingerprint(*datasets: Dataset | None) -> str:
    """SHA-256 of the token ids and labels of the datasets, in order, whatever file they came from."""
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


def token_lengths(dataset: Dataset) -> list[int]:
    """Number of tokens of each row."""
    return [len(labels) for labels in _label_rows(dataset)]


def _label_rows(dataset: Dataset) -> Iterator[np.ndarray]:
    for batch in dataset.select_columns(["labels"]).with_format("numpy").iter(batch_size=1000):
        yield from batch["labels"]


def _tokenize(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    encoder: RowEncoder,
    loss_on: str,
    num_proc: int | None,
    notices: list[str],
) -> Dataset:
    """`input_ids`, `labels` and `row`, the number of the row that each example came from."""
    row_format = _recognize(source, encoder.text_field)
    if row_format.convert is None:
        given = source.rows.select_columns(["input_ids", "labels"])
        return given.add_column("row", list(range(len(given))))
    turns = row_format.turns
    if turns is not None and not isinstance(source.rows[0][turns], str) and not encoder.has_template:
        raise InputError(
            f"{source.name} holds conversations, but the tokenizer has no chat template; name a template, or a model that "
            "has one, with chat_template_path"
        )
    if row_format.name == "text" and loss_on == "assistant":
        notices.append(f"{source.name} has texts without roles: every token is trained")
    examples = source.rows.map(
        _examples,
        with_indices=True,
        batched=True,
        fn_kwargs={"row_format": row_format, "encoder": encoder},
        remove_columns=source.rows.column_names,
        num_proc=num_proc,
        load_from_cache_file=False,
        desc=f"Tokenizing {source.name}",
    )
    _raise_first_problem(source, examples)
    straddling = sum(examples["straddles"])
    if straddling:
        notices.append(
            f"in {straddling} of {len(examples)} rows of {source.name} a turn starts inside a token of the prompt; that "
            "token is trained"
        )
    parts = Counter(examples["row"])
    split = sum(count > 1 for count in parts.values())
    if split:
        notices.append(
            f"{split} of {len(parts)} rows of {source.name} become one for each answer, {len(examples)} in all: the chat "
            "template rewrites earlier turns"
        )
    return examples.select_columns(["input_ids", "labels", "row"])


def _without_numbers(examples: Dataset) -> Dataset:
    return examples.select_columns(["input_ids", "labels"])


def _drop_untrained(
    source: Source, examples: Dataset, max_length: int | None, notices: list[str], allow_untrained: bool
) -> Dataset:
    """The examples with a trained token: InputError if a row never had one, a notice if only truncation removed it."""
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
            f"every token is masked in {len(bare)} of {len(examples)} rows of {source.name} "
            f"({_rows(numbers[i] for i in bare)}), so they train nothing; remove them, set loss_on: all, or --allow "
            "no-trained-token to leave them out"
        )
    if len(cut) == len(examples):
        raise InputError(
            f"every token within max_length {max_length} is masked in all {len(cut)} rows of {source.name}; raise max_length"
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
    problems = [(number, text) for number, text in found if text]
    if not problems:
        return
    first = problems[0][1]
    problem, remedy = json.loads(first)
    same = [number for number, text in problems if text == first]
    verb = "has" if len(same) == 1 else "have"
    raise InputError(f"{_rows(same)} of {source.name} {verb} {problem}; {remedy}")


def _rows(indices: Iterable[int]) -> str:
    """ "row 3" or "rows 3, 4, 9 and 20 more", counted from 1 as an editor counts lines."""
    numbers = [index + 1 for index in indices]
    shown = ", ".join(map(str, numbers[:_SHOWN_ROWS]))
    more = f" and {len(numbers) - _SHOWN_ROWS} more" if len(numbers) > _SHOWN_ROWS else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _examples(
    rows: dict[str, list[Any]], numbers: list[int], row_format: RowFormat, encoder: RowEncoder
) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {"input_ids": [], "labels": [], "problem": [], "straddles": [], "row": []}
    for place, number in enumerate(numbers):
        problem = ""
        try:
            examples = row_format.convert(encoder, {key: column[place] for key, column in rows.items()})
        except RowError as error:
            examples, problem = [([0], [True], False)], json.dumps(error.args)
        for ids, mask, straddles in examples:
            labels = [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]
            for key, value in zip(made, (ids, labels, problem, straddles, number), strict=True):
                made[key].append(value)
    return made
