"""The documents that are written about a model, as Jinja templates."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, /, **values: Any) -> str:
    """The template's text with the values in it; in HTML nothing that a value holds is markup, unless it is `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = _cell
    return environment.get_template(template).render(values)


def _cell(content: Any) -> str:
    """The content of a cell in Markdown: an answer may hold anything, and a table row is one line."""
    text = str(content).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(text.splitlines())
