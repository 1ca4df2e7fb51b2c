"""Pages that people open from a file: they ask for nothing, run nothing, and show any text as text."""

from pathlib import Path
from typing import Any

from stages.lib.report.preview import visible
from stages.lib.run import redaction

TEMPLATES = Path(__file__).parent


def render(template: str, longest: int = 0, **values: Any) -> str:
    """A template of this folder as a page; whatever is in a text, it is shown and does nothing.

    Args:
        template: its file's name. longest: characters of a text, of which more is cut off; 0 is any number.
        values: a `Markup` among them is ours, and is not escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def shown(value: Any) -> Any:
        # A text marked as safe is the template's own.
        return cut(text(value), longest) if type(value) is str else value

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=shown, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(values)


def text(value: str) -> str:
    """A text without secrets, and without what a terminal would obey."""
    return visible(redaction.result(value))


def cut(value: str, longest: int) -> str:
    """The beginning of a text, and how much more there is; all of it where `longest` is 0."""
    more = len(value) - longest
    return f"{value[:longest]} … ({more:,} more characters)" if longest and more > 0 else value
