"""Tools and their calls reach the template in one shape, however a file writes them."""

import json

import pyarrow as pa
import pytest
from datasets import Dataset

from qriemann.data.sources import Source
from qriemann.data.tokenized import tokenize_rows
from qriemann.errors import InputError
from tests.data.test_turns import TOOLS, ask, read, shown, turn
from tests.recipe_fixtures import make_tokenizer

# Takes the arguments as text alone, as DeepSeek's do.
TEXT_TOOLS = TOOLS.replace("c.function | tojson", "c.function.name + ' ' + c.function.arguments")


OSLO = {"city": "Oslo"}


def calling(arguments, **more):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


CALLS = {
    "a mapping": ask("", tool_calls=[calling(OSLO)]),
    "JSON text": ask(None, tool_calls=[calling('{"city": "Oslo"}')]),
    "all calls as JSON text": ask("", tool_calls=json.dumps([calling('{"city": "Oslo"}')])),
    "a call without a wrapper": ask("", tool_calls=[{"name": "weather", "arguments": OSLO}]),
    "OpenAI's older key": ask(None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}),
    "ShareGPT's role": [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    ],
    "ms-swift's role": [
        turn("user", "a"),
        turn("tool_call", '{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}'),
    ],
}


@pytest.mark.parametrize("turns", CALLS.values(), ids=CALLS)
def test_the_arguments_of_a_tool_are_parsed_once_however_they_are_written(turns):
    data = read([{"messages": turns}], TOOLS)
    assert shown(data, TOOLS)[0].endswith(
        '[<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call><|im_end|>]\n'
    )
    assert data.unused == {}
    text = shown(read([{"messages": turns}], TEXT_TOOLS), TEXT_TOOLS)[0]
    assert text.endswith('[<call>weather {"city": "Oslo"}</call><|im_end|>]\n')


@pytest.mark.parametrize("arguments", ["", None, {}, "{}", " "])
def test_a_call_without_arguments_has_an_empty_mapping(arguments):
    text = shown(read([{"messages": ask("", tool_calls=[calling(arguments)])}], TOOLS), TOOLS)[0]
    assert '[<call>{"name": "weather", "arguments": {}}</call><|im_end|>]' in text


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": TOOL},
        {"tools": [json.dumps(TOOL)]},
        {"functions": [TOOL["function"]]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}}]},
    ],
    ids=["list", "JSON", "one", "JSON in a list", "OpenAI's older column", "JSON inside"],
)
def test_tools_reach_the_template_however_they_are_written(columns):
    data = read([{"messages": ask(), **columns}], TOOLS)
    assert shown(data, TOOLS)[0].startswith(f"<tools>{json.dumps([TOOL])}</tools>")
    assert data.unused == {}
    assert read([{"messages": ask(), "tools": [TOOL]}]).unused == {"tools": 1}


def test_tools_of_a_typed_column_have_their_own_keys_alone():
    others = [{"type": "function", "function": {"name": name, "parameters": {name: {"type": "x"}}}} for name in "gh"]
    typed = Dataset(pa.Table.from_pylist([{"messages": ask(), "tools": [tool]} for tool in others]))
    texts = shown(tokenize_rows(Source(typed, "rows"), None, make_tokenizer(TOOLS)), TOOLS)
    assert [text.partition("</tools>")[0] for text in texts] == [f"<tools>{json.dumps([tool])}" for tool in others]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ask(), "tools": '[{"type": '},
        {"messages": ask(), "tools": ["f"]},
        {"messages": ask("", tool_calls=[calling('{"city": ')])},
        {"messages": ask("", tool_calls=[{"type": "function"}])},
        {"messages": '[{"role": "user"'},
        {"messages": ask(), "chat_template_kwargs": "{"},
        {"messages": ask(), "chat_template_kwargs": [1]},
        {"instruction": "a", "output": "b", "history": [["a", "b", "c"]]},
    ],
)
def test_broken_json_in_a_cell_is_one_line_with_the_row(row):
    good = {**row, "messages": ask()} if "messages" in row else {**row, "history": []}
    good = {key: value for key, value in good.items() if key not in ("tools", "chat_template_kwargs")}
    with pytest.raises(InputError, match=r"^row 2 of rows has .*; (correct it|correct them|rewrite it)") as caught:
        read([good, row], TOOLS)
    assert "\n" not in str(caught.value)


def test_a_tool_call_that_the_template_drops_is_no_answer():
    with pytest.raises(InputError, match=r"an empty assistant turn, because .* does not write its tool_calls"):
        read([{"messages": ask("", tool_calls=[calling(OSLO)])}])
    assert read([{"messages": ask("here", tool_calls=[calling(OSLO)])}]).unused == {"messages[].tool_calls": 1}
