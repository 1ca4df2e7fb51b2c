"""No secret in what is written: neither a value that the environment keeps secret, nor what looks like one.

Results, which stand in artifacts and on standard output, lose the values alone: a data set may well hold an
address with a password in it, and is learned to the letter. What is said of the work loses both.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from stages.lib.run import environment

HIDDEN = "***"
LEAST = 8  # characters: shorter ones, such as a local judge's key `none`, are words of their own
TEXTS = frozenset((".json", ".jsonl", ".md", ".html", ".txt", ".yaml", ".csv", ".jinja"))
LOOKS_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}"
    r"|(?<=://)[^\s/?#'\"<>]+(?=@)"  # user and password of a URL
    r"|(?<=[?&])(?:x-amz-(?:credential|signature|security-token)|x-goog-(?:credential|signature)"
    r"|sig|signature|policy|token|access_token|api_?key)=[^&\s'\"<>]+",  # what signs one
    re.I,
)


def said(text: str) -> str:
    """A message, without what is or looks like a secret."""
    return LOOKS_SECRET.sub(HIDDEN, result(text))


def result(text: str) -> str:
    """A text that has to stay as it is, without the values of secrets."""
    for form in _forms(environment.secrets()):
        text = text.replace(form, HIDDEN)
    return text


def plain(value: Any) -> Any:
    """JSON, its strings as `said`."""
    if isinstance(value, str):
        return said(value)
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def line(content: bytes) -> bytes:
    """UTF-8 as `result`, whatever else is in it."""
    for form in _forms(environment.secrets()):
        content = content.replace(form.encode("utf-8", "surrogateescape"), HIDDEN.encode())
    return content


def blocks(file: Any, suffix: str, size: int) -> Iterator[bytes]:
    """The contents of an open file in blocks of about `size` bytes; of a text as `result`."""
    if suffix in TEXTS and _forms(environment.secrets()):
        while lines := file.readlines(size):  # a secret has no end of line in it
            yield line(b"".join(lines))
    else:
        while block := file.read(size):
            yield block


@lru_cache
def _forms(values: tuple[str, ...]) -> tuple[str, ...]:
    """How secrets may be written: as they are, in JSON, in a URL, in base64; the longest first."""
    import base64
    import json
    from urllib.parse import quote

    found = set()
    for value in values:
        if len(value) < LEAST:
            continue
        found |= {value, quote(value, safe=""), quote(value)}
        found |= {json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}
        encoded = value.encode("utf-8", "surrogateescape")
        found |= {base64.b64encode(encoded).decode(), base64.urlsafe_b64encode(encoded).decode()}
    return tuple(sorted(found, key=len, reverse=True))


class Veiled(io.TextIOWrapper):
    """A standard stream whose text passes through a filter.

    Args:
        stream: takes its place over the same file. veil: what each text is written as.
    """

    def __init__(self, stream: io.TextIOWrapper, veil: Callable[[str], str]) -> None:
        stream.flush()
        super().__init__(
            stream.buffer, stream.encoding, stream.errors,
            line_buffering=stream.line_buffering, write_through=stream.write_through,
        )  # fmt: skip
        self._veil, self._stream = veil, stream  # which would close the file with itself

    def write(self, text: str) -> int:
        """Write a text; its own length, as print and others expect."""
        super().write(self._veil(text))
        return len(text)


def guard_streams() -> None:
    """Have all that this process writes to its standard streams pass through here: logs and tracebacks too."""
    for name, veil in (("stdout", result), ("stderr", said)):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the whole process
        elif isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, Veiled(stream, veil))


def drop_output() -> None:
    """Let what is still to be written to standard output go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
