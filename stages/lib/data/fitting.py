"""Rows that are longer than they may be: cut, split or dropped, and what that costs."""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stages.lib.data import conversation
from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.formats import Format
from stages.lib.data.shapes import Misfit

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
POLICIES = ("truncate", "split", "drop", "error")


class Fitted(NamedTuple):
    """What became of a long row.

    Attributes:
        pieces: ids and mask of each row that it became. lost: its tokens that are in none of them.
        going_on: pieces that another one continues, so that none of their ends is an end.
    """

    pieces: list[tuple[Ids, Mask]]
    lost: int
    going_on: int = 0


class Fitter:
    """Makes rows fit `limit` tokens.

    Args:
        policy: one of POLICIES.
    """

    def __init__(self, chat_format: Format, limit: int, policy: str) -> None:
        self.format, self.tokens, self.limit, self.policy = (
            chat_format, chat_format.tokens, limit, policy,
        )  # fmt: skip

    def fit(self, said: Conversation, ids: Ids, mask: Mask, ends: Sequence[int]) -> Fitted:
        """A row of more than `limit` tokens, made to fit; see `Encoded` for `ends`."""
        if self.policy == "truncate":
            return self._truncated(said, ids, mask, ends)
        if self.policy == "split":
            return self._split(said, ids, mask)
        return Fitted([], len(ids))

    def _truncated(self, said: Conversation, ids: Ids, mask: Mask, ends: Sequence[int]) -> Fitted:
        """Whole turns where any answer fits whole; else the first answer cut, and its question if need be."""
        ends = [end for end in ends if mask[end - 1]]
        for end in reversed(ends):
            row = self._closed(ids[:end], mask[:end], ids, ends)
            if len(row[0]) <= self.limit:
                return Fitted([row], len(ids) - end)
        # Where tokens run across the ends of answers, turns cannot be cut between tokens.
        fewer = self._fewer_turns(said) if len(ends) < len(self._answers(said)) else None
        if fewer:
            return Fitted([fewer], len(ids) - len(fewer[0]) + 1)
        if not self._has_room(ids, mask):
            shorter = self._shorter_question(said)
            if not shorter:
                return Fitted([], len(ids))
            lost = len(ids) - len(shorter[0])
            ids, mask = shorter
            if len(ids) <= self.limit:
                return Fitted([(ids, mask)], lost)
            cut = self._closed(ids[: self.limit - 1], mask[: self.limit - 1], ids, ())
            return Fitted([cut], lost + len(ids) - (self.limit - 1))
        cut = self._closed(ids[: self.limit - 1], mask[: self.limit - 1], ids, ends)
        return Fitted([cut], len(ids) - (self.limit - 1))

    def _closed(self, ids: Ids, mask: Mask, whole: Ids, ends: Sequence[int]) -> tuple[Ids, Mask]:
        """A cut row with the token behind it that closes an answer, learned."""
        stops = self.format.stops.ids
        if len(ids) and ids[-1] in stops:
            return ids, mask
        closing = whole[ends[0] - 1] if ends and whole[ends[0] - 1] in stops else whole[-1]
        closing = closing if closing in stops else self.tokens.eos
        return np.append(ids, np.int32(closing)), np.append(mask, True)

    def _has_room(self, ids: Ids, mask: Mask) -> bool:
        """Whether the question leaves a quarter of the room to its answer, or as much as the answer needs."""
        first = int(mask.argmax())
        answer = int(mask.sum())
        return self.limit - 1 - first >= min(answer, self.limit // 4)

    def _answers(self, said: Conversation) -> list[int]:
        """The turns that are learned answers."""
        everything = self.format.loss_on == "all"
        return [
            number
            for number, turn in enumerate(said.turns)
            if turn.role == "assistant" and (turn.learned or everything)
        ]

    def _fewer_turns(self, said: Conversation) -> tuple[Ids, Mask] | None:
        """The most turns, to the end of an answer, that fit."""

        def upto(last: int) -> tuple[Ids, Mask]:
            return self._encoded(said._replace(turns=said.turns[: last + 1]))

        answers = self._answers(said)
        fitting = bisect.bisect_right(answers, self.limit, key=lambda last: len(upto(last)[0]))
        return upto(answers[fitting - 1]) if fitting else None

    def _encoded(self, said: Conversation) -> tuple[Ids, Mask]:
        return self.tokens.encode([self.format.segments(said)]).row(0)

    def _shorter_question(self, said: Conversation) -> tuple[Ids, Mask] | None:
        """The first exchange with what precedes its answer left out, then cut, until that leaves room."""
        try:
            return self._with_room(said)
        except Misfit:  # the template refuses a part of what it writes whole
            return None

    def _with_room(self, said: Conversation) -> tuple[Ids, Mask] | None:
        said = said._replace(turns=said.turns[: self._answers(said)[0] + 1])
        while later := _later(said):
            said = later
            ids, mask = self._encoded(said)
            if self._has_room(ids, mask):
                return ids, mask
        turns = list(said.turns)
        while True:
            longest = max(range(len(turns) - 1), key=lambda n: _size(turns[n]), default=None)
            if longest is None or not _size(turns[longest]):
                return None
            turns[longest] = _cut(turns[longest], _size(turns[longest]) * 7 // 8)
            ids, mask = self._encoded(said._replace(turns=tuple(turns)))
            if self._has_room(ids, mask):
                return ids, mask

    def _split_text(self, ids: Ids, mask: Mask) -> Fitted:
        """Windows of a row that goes on; only the last is closed.

        Each begins with BOS where rows do, else with the last token of the one before, so that all are learned.
        """
        bounds = [*range(self.limit, len(ids), self.limit - 1), len(ids)]
        if len(bounds) > 1:  # an end without what it ends would teach to say nothing
            bounds[-2] = min(bounds[-2], len(ids) - self.limit // 8)
        pieces, lost = [], 0
        for start, end in itertools.pairwise([0, *bounds]):
            part, learned = ids[start:end], mask[start:end]
            if not learned.any():
                lost += end - start
                continue
            if start:
                first = ids[start - 1] if self.tokens.bos is None else self.tokens.bos
                part, learned = np.insert(part, 0, first), np.insert(learned, 0, False)
            pieces.append((part, learned))
        return Fitted(pieces, lost, max(0, len(pieces) - 1))

    def _split(self, said: Conversation, ids: Ids, mask: Mask) -> Fitted:
        if conversation.is_plain(said):
            return self._split_text(ids, mask)
        try:
            return self._split_turns(said)
        except Misfit:  # the template refuses a part of what it writes whole
            return self._split_text(ids, mask)

    def _split_turns(self, said: Conversation) -> Fitted:
        """As many exchanges in each piece as fit, the system turn before each."""
        head, exchanges = self._exchanges(said)
        found = Fitted([], 0)
        waiting: tuple[Ids, Mask] | None = None
        turns: tuple[Turn, ...] = ()
        for exchange in exchanges:
            longer = self._encoded(said._replace(turns=(*head, *turns, *exchange)))
            if waiting and len(longer[0]) > self.limit:
                found = _joined(found, Fitted([waiting], 0))
                turns = ()
                longer = self._encoded(said._replace(turns=(*head, *exchange)))
            turns, waiting = turns + exchange, longer
            if len(longer[0]) > self.limit:
                alone = said._replace(turns=(*head, *exchange))
                found = _joined(found, self._split_exchange(alone, *longer))
                turns, waiting = (), None
        return _joined(found, Fitted([waiting], 0)) if waiting else found

    def _split_exchange(self, said: Conversation, ids: Ids, mask: Mask) -> Fitted:
        """One exchange as pieces of which each goes on with the answer.

        What precedes it without being learned is left out, and its question cut, if need be.
        """
        before = len(ids)
        while len(ids) > self.limit and (later := _later(said)):
            said, (ids, mask) = later, self._encoded(later)
        if not self._has_room(ids, mask):
            shorter = self._shorter_question(said)
            if not shorter:
                return Fitted([], before)
            ids, mask = shorter
        return _joined(Fitted([], before - len(ids)), self._split_text(ids, mask))

    def _exchanges(self, said: Conversation) -> tuple[tuple[Turn, ...], list[tuple[Turn, ...]]]:
        """The system turn, and the others in groups that stand alone: from a question to a learned answer."""
        head = said.turns[:1] if said.turns[0].role == "system" else ()
        answers = self._answers(said)
        starts = [len(head)]
        for number in _questions(said):
            if any(starts[-1] <= answer < number for answer in answers):
                starts.append(number)
        bounds = zip(starts, [*starts[1:], len(said.turns)], strict=True)
        return head, [said.turns[first:last] for first, last in bounds]


def _questions(said: Conversation) -> list[int]:
    """The turns that begin another exchange."""
    turns = list(enumerate(said.turns))[1:]
    return [
        n
        for n, t in turns
        if t.role in ("user", "system") and said.turns[n - 1].role == "assistant"
    ]


def _later(said: Conversation) -> Conversation | None:
    """Without the first exchange, where another follows."""
    head = said.turns[:1] if said.turns[0].role == "system" else ()
    questions = _questions(said)
    return said._replace(turns=(*head, *said.turns[questions[0] :])) if questions else None


def _joined(one: Fitted, other: Fitted) -> Fitted:
    return Fitted(one.pieces + other.pieces, one.lost + other.lost, one.going_on + other.going_on)


def _size(turn: Turn) -> int:
    return max(len(turn.text), len(turn.context))


def _cut(turn: Turn, size: int) -> Turn:
    return turn._replace(text=turn.text[:size], context=turn.context[:size])
