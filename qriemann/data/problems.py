"""Messages about tokenized rows: those that cannot be trained, those that must not be, and columns that are not used."""

import json
from collections import Counter
from collections.abc import Collection, Iterable

from datasets import Dataset

from qriemann.data.sources import Source
from qriemann.data.turns import MARKS
from qriemann.errors import InputError

_SHOWN_ROWS, _SHOWN_COLUMNS = 3, 12


def without_rejected(source: Source, examples: Dataset, allow: Collection[str], notices: list[str]) -> Dataset:
    """The examples that their own columns do not reject; the others raise InputError, or are noted if `allow` drops them."""
    found = [(number, cell) for number, cell in zip(examples["row"], examples["rejected"], strict=True) if cell]
    if not found:
        return examples
    numbers, cells = [number for number, _ in found], dict.fromkeys(cell for _, cell in found)
    shown, them = ", ".join([*cells][:_SHOWN_ROWS]), "it" if len(found) == 1 else "them"
    said = f"{len(found)} of {len(source.rows)} rows of {source.name} say that they are not to be learnt ({shown}; "
    said += f"{rows_in_words(numbers)})"
    if "rejected-rows" not in allow or len(found) == len(source.rows):
        raise InputError(
            f"{said}; remove {them}, --allow rejected-rows to leave {them} out, or rename the column with dataset_columns "
            "if it means something else"
        )
    notices.append(f"{said} and are left out")
    return examples.select([index for index, cell in enumerate(examples["rejected"]) if not cell])


def unused_notices(unused: Counter[str], rows: int) -> list[str]:
    """A line for columns and marks that are not used, and one for what of the turns the chat template does not write."""
    of_turns = [name for name in unused if name == "tools" or ("[]." in name and name.split("[].")[1] not in MARKS)]
    columns = [name for name in unused if name not in of_turns]
    remedy = "; name a template that does with chat_template_path if the model is to learn it"
    lines = (("not used: ", columns, ""), ("the chat template does not write ", of_turns, remedy))
    notices = []
    for beginning, names, end in lines:
        shown = [f"{name} ({unused[name]} of {rows} rows)" for name in names]
        more = f" and {len(shown) - _SHOWN_COLUMNS} more" if len(shown) > _SHOWN_COLUMNS else ""
        notices += [beginning + ", ".join(shown[:_SHOWN_COLUMNS]) + more + end] if shown else []
    return notices


def raise_first_problem(source: Source, examples: Dataset) -> None:
    """Raises InputError if a row has a problem, and names all rows that have the same one as the first."""
    found = zip(examples["row"], examples["problem"], strict=True)
    problems = [(number, text) for number, text in found if text]
    if not problems:
        return
    first = problems[0][1]
    problem, remedy = json.loads(first)
    same = [number for number, text in problems if text == first]
    verb = "has" if len(same) == 1 else "have"
    raise InputError(f"{rows_in_words(same)} of {source.name} {verb} {problem}; {remedy}")


def rows_in_words(indices: Iterable[int]) -> str:
    """ "row 3" or "rows 3, 4, 9 and 20 more", counted from 1 as an editor counts lines."""
    numbers = [index + 1 for index in indices]
    shown = ", ".join(map(str, numbers[:_SHOWN_ROWS]))
    more = f" and {len(numbers) - _SHOWN_ROWS} more" if len(numbers) > _SHOWN_ROWS else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"
