"""The documents that are written about a model, as Jinja templates."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Control characters but tab and newline, and marks of direction.
_MARKS = (*range(9), *range(11, 32), *range(127, 160), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SIGNS = {code: f"[U+{code:04X}]" for code in _MARKS}


def render_document(template: str, /, **values: Any) -> str:
    """The template's text with the values in it; in HTML nothing that a value holds is markup, unless it is `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"cell": _cell, "visible": _visible}
    return environment.get_template(template).render(values)


def _visible(text: Any) -> str:
    """The text with a sign for what a browser would not show, or would reorder its surroundings by."""
    return str(text).translate(_SIGNS).encode("utf-8", "backslashreplace").decode()


def _cell(content: Any) -> str:
    """The content of a cell in Markdown: an answer may hold anything, and a table row is one line."""
    text = str(content).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(text.splitlines())
