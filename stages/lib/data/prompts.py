"""Prompts to answer: one, a file of them, or standard input."""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.lib.data.conversation import is_unicode
from stages.lib.run.exits import BadData, BadSetting, Missing

FILE = "generations.jsonl"


def read(prompt: str | None, path: Path | None) -> list[str]:
    """What is asked: the prompts of a file, a prompt, or standard input.

    Raises:
        BadSetting: nothing. Missing: no such file. BadData: a line that holds no prompt.
    """
    if path:
        return _file(path)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape").strip()
    if not prompt or not prompt.strip():
        raise BadSetting(
            'nothing is asked: use --prompt, make generate PROMPT="...", --prompts-file or standard input'
        )
    if not is_unicode(prompt):
        raise BadSetting("PROMPT is not UTF-8; convert it")
    return [prompt]


def _file(path: Path) -> list[str]:
    if not path.is_file():
        raise Missing(f"there is no prompts file {path.absolute()}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 at byte {error.start}; convert it") from error
    found = [_line(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BadData(f"{path} holds no prompt")
    return found


def _line(path: Path, number: int, line: str) -> str:
    if path.suffix != ".jsonl":
        return line.strip()
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadData(
            f'{path}:{number} is not an object with a `prompt`: write {{"prompt": "..."}}'
        ) from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadData(f"{path}:{number} has an empty `prompt`, or one that is no string")
    if not is_unicode(prompt):
        raise BadData(
            f"{path}:{number} has half a character (a lone surrogate) in `prompt`; mend it"
        )
    return prompt


def digest(prompts: Iterable[str]) -> str:
    """The sha256 of the prompts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def write(folder: Path, prompts: list[str], answers: list[Any]) -> dict[str, Any]:
    """One line a prompt: `prompt`, `answer`, `tokens`, `finish` (`stop` or `length`); the counts as metrics."""
    with (folder / FILE).open("w", encoding="utf-8") as file:
        for prompt, said in zip(prompts, answers, strict=True):
            entry = {
                "prompt": prompt,
                "answer": said.text,
                "tokens": said.tokens,
                "finish": said.finish,
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    stopped = sum(said.finish == "stop" for said in answers)
    return {
        "prompts": len(prompts),
        "stopped": stopped,
        "tokens": sum(said.tokens for said in answers),
    }
