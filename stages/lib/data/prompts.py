"""Prompts to answer: one, a file of them, or standard input."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.data import conversation
from stages.lib.data.conversation import Conversation, Turn, is_unicode
from stages.lib.data.formats import Format
from stages.lib.data.json_rows import Lines
from stages.lib.data.rows import Row
from stages.lib.data.shapes import Misfit, Shape
from stages.lib.run.exits import BadData, BadSetting, Missing

FILE = "generations.jsonl"
FORM = 'a line is an object with a `prompt` or `messages`: {"prompt": "..."}'


@dataclass(frozen=True)
class Asked:
    """A conversation that the model is to continue.

    Attributes:
        said: the conversation. where: it stands, for messages.
        shown: what its line of output says of it: `number` (from 0, of the prompts), `prompt` or `messages`,
            and its own `id` and `system` where it has them.
    """

    said: Conversation
    where: str
    shown: dict[str, Any]

    def ids(self, chat_format: Format) -> list[int]:
        """The ids that the model is to continue.

        Raises:
            BadData: the format cannot write it.
        """
        try:
            return chat_format.prompt(self.said)
        except Misfit as reason:
            raise BadData(
                f"{self.where} cannot be written as {chat_format.name}: {reason}"
            ) from reason


def read(prompt: str | None, path: Path | None, system: str | None) -> list[Asked]:
    """What is asked: the prompts of a file, a prompt, or standard input.

    Args:
        system: what stands before those that say nothing of it themselves.

    Raises:
        BadSetting: nothing. Missing: no such file. BadData: a line that holds no prompt.
    """
    if system and not is_unicode(system):
        raise BadSetting("SYSTEM is not UTF-8; convert it")
    if path:
        return _file(path, system or "")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape").strip()
    if not prompt or not prompt.strip():
        raise BadSetting(
            'nothing is asked: use --prompt, make generate PROMPT="...", --prompts-file or standard input'
        )
    if not is_unicode(prompt):
        raise BadSetting("PROMPT is not UTF-8; convert it")
    return [_asked(prompt, system or "", "the prompt", {"number": 0})]


def _asked(prompt: str, system: str, where: str, shown: dict[str, Any]) -> Asked:
    return Asked(conversation.ask(prompt, system), where, shown | {"prompt": prompt})


def _file(path: Path, system: str) -> list[Asked]:
    if not path.is_file():
        raise Missing(f"there is no prompts file {path.absolute()}")
    found = list(_objects(path, system) if path.suffix == ".jsonl" else _lines(path, system))
    if not found:
        raise BadData(f"{path} holds no prompt")
    return found


def _lines(path: Path, system: str) -> Iterator[Asked]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 at byte {error.start}; convert it") from error
    filled = ((line.strip(), place) for place, line in enumerate(lines, 1) if line.strip())
    for number, (line, place) in enumerate(filled):
        yield _asked(line, system, f"{path}:{place}", {"number": number})


def _objects(path: Path, system: str) -> Iterator[Asked]:
    for number, row in enumerate(Lines(path.read_bytes()).rows()):
        yield _object(row, number, f"{path}:{row.line}", system)


def _object(row: Row, number: int, where: str, system: str) -> Asked:
    data = row.data
    if data is None:
        raise BadData(f"{where}: {row.problem}; {FORM}")
    given = [column for column in ("prompt", "messages") if column in data]
    if len(given) != 1:
        raise BadData(f"{where} has {'both' if given else 'neither'}; {FORM}")
    own = data.get("system")
    if not isinstance(own, (str, type(None))):
        raise BadData(f"{where} has a `system` that is no text")
    shown = {"number": number} | {key: data[key] for key in ("id", "system") if key in data}
    asked, system = data[given[0]], system if own is None else own
    if given[0] == "messages" or isinstance(asked, list):
        said = _conversation(data, given[0], where, system)
        return Asked(said, where, shown | {"messages": asked})
    if not isinstance(asked, str) or not asked.strip():
        raise BadData(f"{where} has an empty `prompt`, or one that is no text")
    return _asked(asked, system, where, shown)


def _conversation(data: dict[str, Any], column: str, where: str, system: str) -> Conversation:
    """The turns of a column, as data sets are read."""
    try:
        said = Shape("messages", (column,)).read({"system": system} | data)
    except Misfit as reason:
        raise BadData(f"{where}: {reason}; mend it") from reason
    last = said.turns[-1]
    if last.role not in ("user", "tool"):
        raise BadData(f"{where} ends with a turn of the {last.role}; the user's must be the last")
    if not last.text.strip():
        raise BadData(f"{where} ends with an empty turn; ask something")
    if system and said.turns[0].role != "system":
        return said._replace(turns=(Turn("system", system), *said.turns))
    return said


def digest(asked: Sequence[Asked]) -> str:
    """The sha256 of all that is asked."""
    told = [[one.shown, one.said.dumps()] for one in asked]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def entry(asked: Asked, answer: Any, prompt_tokens: int, **facts: Any) -> dict[str, Any]:
    """A line of output: what was asked, `answer`, `prompt_tokens`, `tokens`, `finish` (`stop` or `length`)."""
    return asked.shown | {
        "answer": answer.text,
        "prompt_tokens": prompt_tokens,
        "tokens": answer.tokens,
        "finish": answer.finish,
    } | facts  # fmt: skip


def dumps(line: dict[str, Any]) -> str:
    """A line of output as text."""
    return json.dumps(line, ensure_ascii=False)


def metrics(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of some lines of output."""
    return {
        "prompts": len(entries),
        "stopped": sum(line["finish"] == "stop" for line in entries),
        "tokens": sum(line["tokens"] for line in entries),
        "prompt_tokens": sum(line["prompt_tokens"] for line in entries),
    }
