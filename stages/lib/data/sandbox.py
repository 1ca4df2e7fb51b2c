"""The Jinja that chat templates run in: sandboxed, with what transformers gives them, on a fixed day."""

import json
from collections.abc import Callable
from typing import Any

from stages.lib.run.exits import BadData, BadSetting

Render = Callable[[dict[str, Any]], str]


def compiled(source: str, name: str, date: str) -> Render:
    """A template as a function from its variables to text.

    Args:
        name: of it, for messages. date: what it is told of the day, `YYYY-MM-DD`.

    Raises:
        BadSetting: it is not valid Jinja. The function itself: BadData, where a text takes too much to render.
    """
    import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols

    from stages.lib.data.limited import Limited, Runaway

    class Generation(Extension):
        """`{% generation %}`, by which some templates mark answers; here they are found by rendering."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)

    day = datetime.datetime.fromisoformat(date)
    environment = Limited(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = day.strftime
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise BadSetting(
            f"the chat template {name} is not valid at line {error.lineno}: {error.message}; mend it"
        ) from error
    given = dict(template.globals)

    def render(variables: dict[str, Any]) -> str:
        # As `Template.render`, which copies a chain of dictionaries each time and takes twice as long.
        context = template.new_context({**given, **variables}, shared=True)
        environment.spent = 0
        try:
            return environment.concat(template.root_render_func(context))
        except (Runaway, RecursionError, MemoryError, OverflowError) as error:
            raise BadData(
                f"the chat template {name} runs away: it takes more steps or text than any conversation needs; "
                "choose another CHAT_FORMAT or base"
            ) from error

    return render
