"""Token ids and labels for a stock `SFTTrainer`, from rows of any accepted format.

`SFTTrainer` leaves a dataset that has `input_ids` and `labels` as it is, apart from truncation and packing. So the mask is
decided here, for every row, before anything is written.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from qriemann.data.account import count_rows
from qriemann.data.chat_mask import IGNORED, TODAY, Example, RowError
from qriemann.data.row_formats import FORMATS, RowEncoder, RowFormat, find_format
from qriemann.data.sources import Batch, Source
from qriemann.data.turns import MARKS, Row
from qriemann.errors import InputError, first_line, listed

_SHOWN_COLUMNS = 12
# What a row becomes: tokens, and beside them what went wrong, which column rejects the row, and what people should know.
_MADE = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "row": Value("int64"),
        "problem": Value("string"),
        "rejected": Value("string"),
        "unused": List(Value("string")),
        "told": List(Value("string")),
    }
)


@dataclass
class TokenizedData:
    """What the trainer trains on.

    Attributes:
        train, held_out: `input_ids` and `labels`, -100 where a token is not trained.
        unused: how many rows hold something under a column or a turn's key (`messages[].name`) that is not trained.
        numbers: for each row of `train` that of its source's row, counted from 0.
        left_out: rows with nothing to train, as `input_ids`, `labels` and `row`; those of the training rows' source first.
    """

    train: Dataset
    held_out: Dataset | None
    row_format: str
    notices: list[str] = field(default_factory=list)
    unused: dict[str, int] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    left_out: list[Dataset] = field(default_factory=list)


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
    allow: Collection[str] = (),
    read_elsewhere: Collection[str] = (),
) -> TokenizedData:
    """Tokens and labels of the training rows and the held-out ones.

    Args:
        held_out: likewise; None to take `eval_size` of the training rows.
        max_length: in tokens; rows with nothing to train before it are dropped, with a notice. None for no limit.
        eval_size: the share (below 1) or the number of training rows to hold out; 0 for none.
        max_held_out: upper bound of the rows that a share `eval_size` holds out.
        allow: leave rows out, with a notice, instead of refusing them: those without a trained token
            (`no-trained-token`), and those whose own columns say that they are not to be learnt (`rejected-rows`).
        read_elsewhere: columns that the caller reads, so that they do not count as unused.

    Raises:
        InputError: rows have no usable columns, an empty turn, no trained token, or turns that the template refuses,
            or are not to be learnt.
    """
    notices: list[str] = []
    unused: Counter[str] = Counter()
    left_out: list[Dataset] = []
    row_format = _recognize(train, text_field)
    encoder = RowEncoder(tokenizer, loss_on, text_field)

    def tokenize(source: Source) -> Dataset:
        examples = _tokenize(source, encoder, loss_on, num_proc, allow, notices, unused)
        kept, dropped = _drop_untrained(source, examples, max_length, notices, "no-trained-token" in allow)
        left_out.append(dropped)
        return kept

    tokens = tokenize(train)
    kept = None if held_out is None else tokenize(held_out).remove_columns("row")
    for name in read_elsewhere:
        del unused[name]
    notices += _unused_notices(unused, len(train.rows) + (0 if held_out is None else len(held_out.rows)))
    if encoder.writes_date and row_format.has_answers:
        notices.append(f"the chat template writes today's date: rows have {TODAY:%d %B %Y} instead, on any day")
    numbers, tokens = tokens["row"][:], tokens.remove_columns("row")
    data = TokenizedData(tokens, kept, row_format.name, notices, dict(unused), numbers, left_out)
    if kept is not None:
        return data
    # A conversation that became several rows is held out whole.
    by_row: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(data.numbers):
        by_row[number].append(index)
    members = list(by_row.values())
    count = round(eval_size * len(members)) if eval_size < 1 else int(eval_size)
    count = max(count, 1) if eval_size > 0 else 0
    count = min(count, max_held_out) if max_held_out is not None and eval_size < 1 else count
    if count == 0:
        return data
    if count >= len(members):
        raise InputError(
            f"eval_size must leave one of {train.name}'s {len(members)} rows to train on, got {eval_size:g}; or set it to 0"
        )
    parts = Dataset.from_dict({"member": range(len(members))}).train_test_split(test_size=count, seed=seed)
    trained, tested = (
        [index for member in parts[name]["member"] for index in members[member]] for name in ("train", "test")
    )
    data.train, data.held_out = data.train.select(trained), data.train.select(tested)
    data.numbers = [data.numbers[index] for index in trained]
    notices.append(f"{count} of {len(members)} rows of {train.name} are held out (eval_size {eval_size:g})")
    return data


def _recognize(source: Source, text_field: str) -> RowFormat:
    """The format of the rows; raises InputError, naming the columns found and those accepted, if there is none."""
    row_format = find_format(source.columns, text_field)
    if row_format is None:
        raise InputError(
            f"{source.name} must have usable columns, got {', '.join(sorted(source.columns)) or 'none'}; accepted are "
            f"{', or '.join(entry.words for entry in FORMATS)}"
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
                # Several processes leave chunks of other lengths.
                column = batch.column(name).combine_chunks()
                digest.update(column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
                digest.update(column.flatten().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def _tokenize(
    source: Source,
    encoder: RowEncoder,
    loss_on: str,
    num_proc: int | None,
    allow: Collection[str],
    notices: list[str],
    unused: Counter[str],
) -> Dataset:
    """`input_ids`, `labels` and `row`, the number of the row that each example came from."""
    row_format = _recognize(source, encoder.text_field)
    if row_format.convert is None:
        given = _given_tokens(source)
        unused.update({name: len(given) for name in source.columns if name not in given.column_names})
        return given.add_column("row", list(range(len(given))))
    if not row_format.has_answers and loss_on == "assistant":
        notices.append(f"{source.name} has texts without roles: every token is trained")
    examples = source.rows.map(
        _examples,
        with_indices=True,
        batched=True,
        fn_kwargs={"read": source.read, "row_format": row_format, "encoder": encoder},
        remove_columns=source.rows.column_names,
        features=_MADE,
        num_proc=num_proc,
        load_from_cache_file=False,
        keep_in_memory=True,
        desc=f"Tokenizing {source.name}",
    )
    _raise_first_problem(source, examples)
    examples = _without_rejected(source, examples, allow, notices)
    for names in examples["unused"]:
        unused.update(names)
    for line, count in Counter(line for lines in examples["told"] for line in lines).items():
        notices.append(f"in {count} of {len(source.rows)} rows of {source.name}, {line}")
    parts = Counter(examples["row"])
    split = sum(count > 1 for count in parts.values())
    if split:
        notices.append(
            f"{split} of {len(parts)} rows of {source.name} become one for each answer, {len(examples)} in all: the chat "
            "template rewrites earlier turns"
        )
    return examples.select_columns(["input_ids", "labels", "row"])


def _given_tokens(source: Source) -> Dataset:
    """The tokens and labels of rows that hold them."""
    names = ["input_ids", "labels"]
    if not (source.holds_json or source.renamed):
        return source.rows.select_columns(names)
    features = Features(dict.fromkeys(names, List(Value("int64"))))
    try:
        return Dataset.from_list([{name: row.get(name) for name in names} for row in source], features=features)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"input_ids and labels of {source.name} must be lists of whole numbers: {first_line(error)}"
        ) from error


def _drop_untrained(
    source: Source, examples: Dataset, max_length: int | None, notices: list[str], allow_untrained: bool
) -> tuple[Dataset, Dataset]:
    """The examples with a trained token that is kept, and those without.

    Raises InputError if a row never had one, and notes if only truncation removed it.
    """
    found, numbers, count = count_rows(examples, max_length).found, examples["row"], len(examples)
    bare, beyond = (np.flatnonzero(found[name]).tolist() for name in ("masked", "beyond"))
    of_rows = f"of {count} rows of {source.name}"
    if bare and (not allow_untrained or len(bare) == count):
        raise InputError(
            f"every token is masked in {len(bare)} {of_rows} ({_rows_in_words(numbers[i] for i in bare)}), so they train "
            "nothing; remove them, set loss_on: all, or --allow no-trained-token to leave them out"
        )
    if len(beyond) == count:
        raise InputError(
            f"every token within max_length {max_length} is masked in all {count} rows of {source.name}; raise max_length"
        )
    if found["cut"].any():
        notices.append(f"{found['cut'].sum()} {of_rows} are cut at max_length {max_length}")
    if bare:
        notices.append(f"{len(bare)} {of_rows} have no trained token and are left out")
    if beyond:
        notices.append(
            f"{len(beyond)} {of_rows} have no trained token within max_length {max_length} and are left out: "
            f"{_rows_in_words(numbers[i] for i in beyond)}"
        )
    left_out = found["masked"] | found["beyond"]
    kept = examples.select(np.flatnonzero(~left_out)) if left_out.any() else examples
    return kept, examples.select(np.flatnonzero(left_out))


def _examples(
    batch: Batch, numbers: list[int], read: Callable[[Batch], list[Row]], row_format: RowFormat, encoder: RowEncoder
) -> Batch:
    made: Batch = {name: [] for name in _MADE}
    for row, number in zip(read(batch), numbers, strict=True):
        examples: list[Example] = [([0], [True])]
        problem, rejected = None, row.rejected(rated=row_format.has_answers)
        try:
            if rejected is None:
                assert row_format.convert is not None
                examples = row_format.convert(encoder, row)
        except RowError as error:
            problem = json.dumps(error.args)
        unused, told = row.unused if rejected is None else [], sorted(row.told)
        for ids, mask in examples:
            labels = [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]
            values = (ids, labels, number, problem, rejected, unused, told)
            for name, value in zip(_MADE, values, strict=True):
                made[name].append(value)
            # Once for each row, whatever it became.
            unused, told = [], []
    return made


def _without_rejected(source: Source, examples: Dataset, allow: Collection[str], notices: list[str]) -> Dataset:
    """The examples that their own columns do not reject; the others raise InputError, or are noted if `allow` drops them."""
    found = [(number, cell) for number, cell in zip(examples["row"], examples["rejected"], strict=True) if cell]
    if not found:
        return examples
    numbers, cells = [number for number, _ in found], dict.fromkeys(cell for _, cell in found)
    shown, them = listed(cells), "it" if len(found) == 1 else "them"
    said = f"{len(found)} of {len(source.rows)} rows of {source.name} say that they are not to be learnt ({shown}; "
    said += f"{_rows_in_words(numbers)})"
    if "rejected-rows" not in allow or len(found) == len(source.rows):
        raise InputError(
            f"{said}; remove {them}, --allow rejected-rows to leave {them} out, or rename the column with dataset_columns"
        )
    notices.append(f"{said} and are left out")
    return examples.select([index for index, cell in enumerate(examples["rejected"]) if not cell])


def _unused_notices(unused: Counter[str], rows: int) -> list[str]:
    """A line for columns and marks that are not used, and one for what of the turns the chat template does not write."""
    of_turns = [name for name in unused if name == "tools" or ("[]." in name and name.split("[].")[1] not in MARKS)]
    columns = [name for name in unused if name not in of_turns]
    remedy = "; name a template that does with chat_template_path if the model is to learn it"
    lines = (("not used: ", columns, ""), ("the chat template does not write ", of_turns, remedy))
    notices = []
    for beginning, names, end in lines:
        shown = [f"{name} ({unused[name]} of {rows} rows)" for name in names]
        notices += [beginning + listed(shown, _SHOWN_COLUMNS) + end] if shown else []
    return notices


def _raise_first_problem(source: Source, examples: Dataset) -> None:
    """Raises InputError if a row has a problem, and names all rows that have the same one as the first."""
    found = zip(examples["row"], examples["problem"], strict=True)
    problems = [(number, text) for number, text in found if text]
    if not problems:
        return
    first = problems[0][1]
    problem, remedy = json.loads(first)
    same = [number for number, text in problems if text == first]
    verb = "has" if len(same) == 1 else "have"
    raise InputError(f"{_rows_in_words(same)} of {source.name} {verb} {problem}; {remedy}")


def _rows_in_words(indices: Iterable[int]) -> str:
    """ "row 3" or "rows 3, 4, 9 and 20 more", counted from 1 as an editor counts lines."""
    numbers = [index + 1 for index in indices]
    return f"row{'s' if len(numbers) > 1 else ''} {listed(numbers)}"
