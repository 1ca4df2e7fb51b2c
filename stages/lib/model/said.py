"""What an answer is: the text of its tokens up to a stop, shown while it is said."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Tokenizer(Protocol):
    """What answering needs of a tokenizer; see `stages.lib.data.tokens.Tokens`."""

    pad: int

    def decode(self, ids: Sequence[int]) -> str: ...


class Stops(Protocol):
    """What ends an answer: texts and token ids; see `stages.lib.data.formats.Stops`."""

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Answer:
    """What the model said. `finish` is `stop` where it ended by itself, `length` at the limit."""

    text: str
    tokens: int
    finish: str


class Ends:
    """What ends an answer, asked of every token.

    Args:
        stops: texts and token ids.
    """

    def __init__(self, tokens: Tokenizer, stops: Stops) -> None:
        self.tokens, self.stops, self.ids = tokens, stops, frozenset(stops.ids)
        # A stop text has no more tokens than bytes, so it lies within so many of the last; one more, as
        # some decoders drop the first blank of a text.
        self.reach = max((len(text.encode()) + 1 for text in stops.texts), default=0)
        self._last = {text[-1] for text in stops.texts} | {
            "\ufffd"
        }  # the latter: part of a character
        self._may: dict[int, bool] = {}

    def at_text(self, ids: Sequence[int]) -> bool:
        """Whether the last of these tokens completes a stop text."""
        if not self.reach:
            return False
        token = ids[-1]
        if token not in self._may:
            self._may[token] = not self._last.isdisjoint(self.tokens.decode([token]))
        return self._may[token] and holds(self.tokens.decode(ids[-self.reach :]), self.stops.texts)


class Said:
    """An answer as it grows.

    Args:
        limit: tokens at most. write: gets its text as it is said, but what may be the beginning of a stop.
    """

    def __init__(
        self, ends: Ends, limit: int, write: Callable[[str], object] | None = None
    ) -> None:
        self.ends, self.limit, self.write = ends, limit, write
        self.tokens, self.stops = ends.tokens, ends.stops
        self.ids: list[int] = []
        self.shown = 0

    def add(self, token: int) -> bool:
        """Take the next token; whether the answer goes on."""
        self.ids.append(token)
        ended = token in self.ends.ids or self.ends.at_text(self.ids)
        goes_on = not ended and len(self.ids) < self.limit
        if self.write:
            self._show(held_back=goes_on)
        return goes_on

    def answer(self) -> Answer:
        """What was said."""
        return answer_of(self.ids, self.tokens, self.stops)

    def _show(self, held_back: bool) -> None:
        assert self.write
        said = [token for token in self.ids if token not in self.stops.ids]
        text = _until(self.tokens.decode(said).lstrip(), self.stops.texts)
        # An unfinished character shows as U+FFFD until its last byte is there.
        limit = len(text.rstrip("\ufffd"))
        if held_back:
            ends = [
                n
                for stop in self.stops.texts
                for n in range(1, len(stop))
                if text.endswith(stop[:n])
            ]
            limit = min(limit, len(text) - max(ends, default=0))
        if limit > self.shown:
            self.write(text[self.shown : limit])
            self.shown = limit


def answer_of(ids: Sequence[int], tokens: Tokenizer, stops: Stops) -> Answer:
    """The answer that some ids are, whatever follows its end."""
    end = next((n for n, token in enumerate(ids) if token in stops.ids), None)
    ended, said = end is not None, ids[:end]
    text = tokens.decode(said)
    at_stop = holds(text, stops.texts)
    if at_stop:  # what comes after it is padding, or another row's time
        spoken = (n for n in range(len(said)) if holds(tokens.decode(said[:n]), stops.texts))
        said = said[: next(spoken, len(said))]
    finish = "stop" if ended or at_stop else "length"
    return Answer(_until(text, stops.texts).strip(), len(said) + (ended and not at_stop), finish)


def holds(text: str, stops: Sequence[str]) -> bool:
    """Whether one of the stop texts lies in it."""
    return any(stop in text for stop in stops)


def _until(text: str, stops: Sequence[str]) -> str:
    places = [text.index(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text
