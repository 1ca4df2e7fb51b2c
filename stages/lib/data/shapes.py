"""The shapes that rows come in, and how a row of each becomes a conversation."""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from stages.lib.data.conversation import Conversation, Turn

MARKS = {"### Human:": "user", "### Assistant:": "assistant"}
MARK = re.compile("(" + "|".join(map(re.escape, MARKS)) + ")")
SPEAKERS = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bot": "assistant", "system": "system",
    "developer": "system", "function_call": "call", "tool_call": "call", "observation": "tool",
    "function_response": "tool", "function": "tool", "tool": "tool", "ipython": "tool",
}  # fmt: skip
# (what is asked, what it is about, the answer)
PAIRS = (
    ("instruction", "input", "output"), ("instruction", "input", "response"),
    ("instruction", "context", "response"), ("prompt", "", "completion"), ("prompt", "", "response"),
    ("question", "context", "answer"),
)  # fmt: skip


MOST_NAMES, LONGEST_NAME = 30, 100


class Misfit(ValueError):
    """A row that does not have its data set's shape; the message is the reason."""


class Shape(NamedTuple):
    """How the rows of one data set are read.

    Attributes:
        name: `guanaco`, `alpaca`, `sharegpt`, `messages` or `text`.
        columns: those that are read, the required ones first. needed: how many of them are required.
    """

    name: str
    columns: tuple[str, ...]
    needed: int = 1

    def read(self, row: dict[str, Any]) -> Conversation:
        """The conversation that a row holds.

        Raises:
            Misfit: it does not have this shape.
        """
        return READERS[self.name](self, row)

    def text(self, row: dict[str, Any], column: str) -> str:
        """A column's text; empty where the column is optional and absent."""
        value = row.get(column)
        if isinstance(value, str):
            return value
        if value is None and column not in self.columns[: self.needed]:
            return ""
        if value is None and column not in row:
            near = difflib.get_close_matches(column, [str(key) for key in row], n=1)
            hint = f"; is it {near[0]!r}?" if near else ""
            raise Misfit(f"no column {column!r} (it has {listed(row)}){hint}")
        raise Misfit(f"column {column!r} holds {_kind(value)}, not text")


def listed(columns: Iterable[Any]) -> str:
    """Columns as an error shows them: the first ones, where there are many."""
    names = [repr(str(column)[:LONGEST_NAME]) for column in columns]
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return (", ".join(names[:MOST_NAMES]) or "none") + more


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "no text")


def parse_guanaco(text: str) -> tuple[Turn, ...]:
    """The turns of a guanaco `text`; what stands before the first mark is the system turn.

    One blank behind a mark and one line break before the first belong to the format.
    """
    first, *rest = MARK.split(text)
    turns = [Turn("system", first.removesuffix("\n"))] if first.strip() else []
    return (
        *turns,
        *(
            Turn(MARKS[mark], said.removeprefix(" "))
            for mark, said in zip(rest[::2], rest[1::2], strict=True)
        ),
    )


def _guanaco(shape: Shape, row: dict[str, Any]) -> Conversation:
    text = shape.text(row, shape.columns[0])
    turns = parse_guanaco(text)
    if text.strip() and all(turn.role == "system" for turn in turns):
        raise Misfit(f"column {shape.columns[0]!r} has no mark ({' or '.join(MARKS)})")
    return Conversation(turns or (Turn("user", ""),))


def _text(shape: Shape, row: dict[str, Any]) -> Conversation:
    return Conversation((Turn("text", shape.text(row, shape.columns[0])),))


def _alpaca(shape: Shape, row: dict[str, Any]) -> Conversation:
    asked, about, answer = shape.columns[:1], shape.columns[2:3], shape.columns[1]
    if isinstance(row.get(asked[0]), list) and isinstance(row.get(answer), list):
        return Conversation(tuple(map(_message, [*row[asked[0]], *row[answer]])), _tools(row))
    turns = _system(row)
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            raise Misfit("column 'history' does not hold pairs of question and answer")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    context = shape.text(row, about[0]) if about and about[0] else ""
    turns.append(Turn("user", shape.text(row, asked[0]), context))
    turns.append(Turn("assistant", shape.text(row, answer)))
    return Conversation(tuple(turns))


def _system(row: dict[str, Any]) -> list[Turn]:
    system = row.get("system") or row.get("system_prompt")
    return [Turn("system", system)] if isinstance(system, str) and system.strip() else []


def _chat(shape: Shape, row: dict[str, Any]) -> Conversation:
    """ShareGPT's `from` and `value`, or OpenAI's `role` and `content`; each in either column."""
    column = shape.columns[0]
    entries = row.get(column)
    if isinstance(entries, str) and entries.lstrip()[:1] == "[":  # as CSV holds it
        entries = _json(entries, column)
    if not isinstance(entries, list) and entries != "":
        if column not in row:
            shape.text(row, column)
        kind = "text" if isinstance(entries, str) else _kind(entries)
        raise Misfit(f"column {column!r} holds {kind}, not a list of messages")
    if not entries:
        return Conversation((Turn("user", ""),))
    turns = [_spoken(e) if isinstance(e, dict) and e.get("from") else _message(e) for e in entries]
    system = [] if turns[0].role == "system" else _system(row)
    return Conversation((*system, *turns), _tools(row))


def _spoken(entry: dict[str, Any]) -> Turn:
    speaker, value = entry.get("from"), entry.get("value")
    role = SPEAKERS.get(str(speaker).lower())
    if role is None:
        raise Misfit(f"a turn is from {speaker!r}; known are {', '.join(SPEAKERS)}")
    if not isinstance(value, str):
        raise Misfit(f"a turn's 'value' holds {_kind(value)}, not text")
    if role == "call":
        return Turn("assistant", "", calls=_calls(_json(value, "value")))
    return Turn(role, value, learned=entry.get("weight") != 0)


def _message(entry: Any) -> Turn:
    if not isinstance(entry, dict):
        raise Misfit(f"a message is {_kind(entry)}, not an object with 'role' and 'content'")
    role = SPEAKERS.get(str(entry.get("role")).lower())
    if role is None or role == "call":
        raise Misfit(
            f"a message has the role {entry.get('role')!r}; known are system, user, assistant, tool"
        )
    given = entry.get("tool_calls") or (
        [entry["function_call"]] if entry.get("function_call") else []
    )
    calls = _calls(given) if given else ()
    text = _content(entry.get("content"), bool(calls))
    name = entry.get("name") if role == "tool" else ""
    return Turn(role, text, "", calls, str(name or ""), entry.get("weight") != 0)


def _content(content: Any, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if isinstance(content, list):
        kinds = {str(part.get("type")) if isinstance(part, dict) else "?" for part in content}
        if kinds <= {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        others = ", ".join(sorted(kinds - {"text"})) or "broken"
        raise Misfit(f"a message's content has parts of kind {others}; only text can be learned")
    raise Misfit(f"a message's 'content' holds {_kind(content)}, not text")


def _calls(given: Any) -> tuple[dict[str, Any], ...]:
    """Tool calls as chat templates read them: `function` with `name` and `arguments`, an object."""
    found = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Misfit("a tool call has no function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, "arguments") if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise Misfit(f"a tool call's arguments are {_kind(arguments)}, not an object")
        found.append(
            {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return tuple(_sound(found, "arguments"))


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else []
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Misfit("column 'tools' does not hold a list of objects")
    return tuple(_sound(tools, "tools"))


def _json(text: str, where: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Misfit(f"{where!r} holds text that is not the JSON it should be: {error}") from error
    return _sound(found, where)


def _sound(value: Any, where: str) -> Any:
    """A value that came in a JSON text or a table, if it is one that a template can write."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Misfit(f"{where!r} holds what JSON cannot: {error}") from error
    return value


READERS: dict[str, Callable[[Shape, dict[str, Any]], Conversation]] = {
    "guanaco": _guanaco, "alpaca": _alpaca, "sharegpt": _chat, "messages": _chat, "text": _text,
}  # fmt: skip
