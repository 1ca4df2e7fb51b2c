"""From rows to token ids that fit, every row and token accounted for."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from stages.lib.data import sources
from stages.lib.data.conversation import (
    GUANACO,
    Segment,
    Turn,
    is_unicode,
    parse,
    render,
    render_prompt,
)
from stages.lib.data.sources import Row, Source
from stages.lib.data.tokens import Tokens
from stages.lib.run.exits import BadData

BATCH = 1000


@dataclass
class Example:
    """One row on its way: where it came from, what it says, and then its ids and mask.

    `unanswered` is the text of turns at the end that nobody answers; `cut` says that tokens were lost.
    """

    row: int
    where: str
    text: str
    turns: list[Turn]
    unanswered: str = ""
    cut: bool = False
    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)

    def prompt(self) -> dict[str, Any] | None:
        """The conversation up to the last answer, and that answer; None where nothing is asked."""
        if self.cut:
            return None
        answers = [i for i, turn in enumerate(self.turns) if turn.role == "assistant"]
        if not answers or not any(turn.role == "user" for turn in self.turns[: answers[-1]]):
            return None
        before = self.turns[: answers[-1]]
        reference = self.turns[answers[-1]].text.strip()
        question = before[-1].text.strip()
        return {
            "row": self.row,
            "question": question,
            "prompt": render_prompt(before),
            "reference": reference,
        }


@dataclass
class Ledger:
    """What became of every row and token."""

    rows_read: int = 0
    rows_kept: int = 0
    rows_dropped: dict[str, int] = field(default_factory=dict)
    rows_truncated: int = 0
    rows_held_out: int = 0
    turns_dropped: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    tokens_lost: int = 0
    rows_ending_in_trained_eos: int = 0
    lengths: list[int] = field(default_factory=list)

    def drop(self, reason: str) -> None:
        """Count a row that is not kept."""
        self.rows_dropped[reason] = self.rows_dropped.get(reason, 0) + 1

    def keep(self, example: Example, eos: int) -> None:
        """Count a row that is kept."""
        self.rows_kept += 1
        self.tokens += len(example.ids)
        self.trainable_tokens += sum(example.trained)
        self.rows_ending_in_trained_eos += example.ids[-1] == eos and example.trained[-1]
        self.lengths.append(len(example.ids))

    def metrics(self) -> dict[str, Any]:
        """For the manifest; `length_quantiles` are tokens of kept rows."""
        found = asdict(self)
        lengths = sorted(found.pop("lengths"))
        quantiles = {
            q: lengths[min(len(lengths) - 1, int(q * len(lengths)))]
            for q in (0, 0.25, 0.5, 0.75, 0.95, 1)
        }
        shape = {"shape": GUANACO, "chat_format": GUANACO}
        return (
            found
            | {"length_quantiles": {f"{q:g}": tokens for q, tokens in quantiles.items()}}
            | shape
        )

    def check(self, name: str) -> None:
        """Refuse a data set that leaves nothing to train on."""
        if self.rows_kept == self.rows_held_out:
            reasons = (
                ", ".join(f"{n} {reason}" for reason, n in self.rows_dropped.items())
                or "none dropped"
            )
            held = f", {self.rows_held_out} held out" if self.rows_held_out else ""
            raise BadData(
                f"{name} leaves no row to train on: {self.rows_read} read, {reasons}{held}; "
                "add rows, or mend what drops them"
            )


def examples(
    source: Source,
    tokens: Tokens,
    ledger: Ledger,
    *,
    max_rows: int | None,
    max_length: int,
    on_long: str,
    loss_on: str,
    validation_fraction: float,
    seed: int,
) -> Iterator[tuple[str, Example]]:
    """Every row that is kept, with its part: `train` or `held_out`.

    A data set's own test split is held out as it is; else a share of the rows is, by a hash of their text.
    """

    def tokenised(rows: Iterable[Row]) -> Iterator[Example]:
        found = conversations(rows, loss_on, ledger)
        return tokenise(found, tokens, loss_on, max_length, on_long, ledger)

    fraction = 0 if source.held_out else validation_fraction
    first = tokenised(itertools.islice(sources.rows(source, source.train), max_rows))
    parts = [split(first, fraction, seed)]
    if source.held_out:
        parts.append(("held_out", e) for e in tokenised(sources.rows(source, source.held_out)))
    for part, example in itertools.chain(*parts):
        ledger.rows_held_out += part == "held_out"
        yield part, example


def conversations(rows: Iterable[Row], loss_on: str, ledger: Ledger) -> Iterator[Example]:
    """The rows that hold a conversation; the others are counted, or are an error where a column is missing."""
    for row in rows:
        ledger.rows_read += 1
        text = _text(row)
        if not text.strip():
            ledger.drop("empty")
            continue
        turns = parse(text)
        answered = len(turns)
        while loss_on == "assistant" and answered and turns[answered - 1].role != "assistant":
            answered -= 1
        if not answered:
            ledger.drop("no_answer")
            continue
        ledger.turns_dropped += len(turns) - answered
        unanswered = "".join(segment.text for segment in render(turns[answered:], loss_on))
        yield Example(ledger.rows_read, row.where, text, turns[:answered], unanswered)


def _text(row: Row) -> str:
    if not isinstance(row.data, dict):
        raise BadData(
            f"{row.where} is {type(row.data).__name__}, not an object with a `text` column"
        )
    if "text" not in row.data:
        columns = ", ".join(map(str, row.data)) or "none"
        raise BadData(
            f"{row.where} has no `text` column (its columns: {columns}); rename the one that holds it"
        )
    text = row.data["text"]
    if not isinstance(text, str):
        raise BadData(
            f"{row.where} has {type(text).__name__} in `text`, which must be a string; mend the row"
        )
    if not is_unicode(text):
        raise BadData(
            f"{row.where} has half a character (a lone surrogate) in `text`; mend the row"
        )
    return text


def tokenise(
    examples: Iterable[Example],
    tokens: Tokens,
    loss_on: str,
    max_length: int,
    on_long: str,
    ledger: Ledger,
) -> Iterator[Example]:
    """Give each example its ids and mask, at most `max_length` tokens with EOS, and count it."""
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == BATCH:
            yield from _encode(batch, tokens, loss_on, max_length, on_long, ledger)
            batch = []
    yield from _encode(batch, tokens, loss_on, max_length, on_long, ledger)


def _encode(
    batch: list[Example],
    tokens: Tokens,
    loss_on: str,
    max_length: int,
    on_long: str,
    ledger: Ledger,
) -> Iterator[Example]:
    segments: list[list[Segment]] = [render(example.turns, loss_on) for example in batch]
    for example, found in zip(batch, tokens.encode(segments, loss_on != "all"), strict=True):
        example.ids, example.trained = found
        if example.unanswered:
            ledger.tokens_lost += len(tokens.encode_prompt(example.unanswered))
        if _fit(example, max_length, on_long, tokens.eos, ledger):
            ledger.keep(example, tokens.eos)
            yield example


def _fit(example: Example, max_length: int, on_long: str, eos: int, ledger: Ledger) -> bool:
    """Cut or refuse an example that is too long; whether it is kept."""
    before = len(example.ids)
    if before > max_length:
        if on_long == "error":
            raise BadData(
                f"{example.where} has {before} tokens, MAX_LENGTH is {max_length}; raise it, or choose "
                "ON_LONG=truncate or drop"
            )
        if on_long == "drop":
            ledger.drop("too_long")
            ledger.tokens_lost += before
            return False
        cut = max_length - 1
        # End with something learned, so that EOS is learned too.
        while cut and not example.trained[cut - 1]:
            cut -= 1
        example.ids = [*example.ids[:cut], eos]
        example.trained = [*example.trained[:cut], True]
        example.cut = True
    if not any(example.trained[:-1]):
        ledger.drop("nothing_to_learn")
        ledger.tokens_lost += before
        return False
    if before > max_length:
        ledger.rows_truncated += 1
        ledger.tokens_lost += before - len(example.ids)
    return True


def split(examples: Iterable[Example], fraction: float, seed: int) -> Iterator[tuple[str, Example]]:
    """Name the part of each example, `train` or `held_out`, by a hash of its text.

    A row stays on its side when others are added. Where chance leaves the held-out part empty, the row with
    the smallest hash goes there.
    """
    least: tuple[float, Example] | None = None
    held = False
    for example in examples:
        place = _place(example.text, seed)
        if fraction and (least is None or place < least[0]):
            least, (place, example) = (place, example), least or (-1.0, example)
            if place < 0:
                continue
        part = "held_out" if place < fraction else "train"
        held = held or part == "held_out"
        yield part, example
    if least:
        yield "held_out" if least[0] < fraction or not held else "train", least[1]


def _place(text: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
