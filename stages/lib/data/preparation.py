"""From rows to token ids that fit: what one process does with a chunk of rows."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stages.lib.data import conversation, duplicates
from stages.lib.data.conversation import Conversation
from stages.lib.data.fitting import Fitted, Fitter
from stages.lib.data.formats import Format
from stages.lib.data.reading import Chunk, Row
from stages.lib.data.rows import bad_data
from stages.lib.data.shapes import Misfit, Shape
from stages.lib.data.templates import Segment


class Outcome(NamedTuple):
    """What became of one row.

    Attributes:
        line, byte: where it stands in its file. reason: why it is not kept, empty where it is.
        detail: the reason in words. raw: the text of a bad row. last: whether nothing after it could be read.
        digest: of the conversation. place: its `place` among all, by which it may be held out.
        tokens: before anything was cut. cut: of them, what was. unanswered: of them, those of turns at the end
        that nobody answers, which are left out; turns: how many. long: whether it was over the limit.
        pieces: rows that it became. going_on: of them, those that another continues.
        prompt: the conversation up to its last answer, and that answer, where it may be asked in evaluation.
        mark: MinHash, where near duplicates are looked for.
    """

    line: int
    byte: int | None
    reason: str = ""
    detail: str = ""
    raw: str = ""
    last: bool = False
    digest: bytes = b""
    place: float = 0.0
    tokens: int = 0
    cut: int = 0
    unanswered: int = 0
    turns: int = 0
    long: bool = False
    pieces: int = 0
    going_on: int = 0
    prompt: dict[str, Any] | None = None
    mark: Any = None


class Batch(NamedTuple):
    """A chunk of rows, prepared.

    Attributes:
        outcomes: of every row. ids: int32 [tokens], learned: bool [tokens] and starts: int64 [pieces + 1] of
        the pieces of kept rows, in order.
    """

    outcomes: list[Outcome]
    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]


class Job(NamedTuple):
    """A chunk to prepare. `ask`: share of its rows, by `place`, that may be asked in evaluation."""

    chunk: Chunk
    shape: Shape
    ask: float


class Preparer:
    """Turns chunks into batches; the same in every process.

    Args:
        near: whether to take the MinHash of each row.
    """

    def __init__(self, chat_format: Format, limit: int, policy: str, seed: int, near: bool) -> None:
        self.format, self.tokens, self.limit = chat_format, chat_format.tokens, limit
        self.fitter = Fitter(chat_format, limit, policy)
        self.seed, self.near = seed, near

    def __call__(self, job: Job) -> Batch:
        """Prepare one chunk."""
        outcomes: list[Outcome] = []
        said: dict[int, Conversation] = {}
        segments: list[list[Segment]] = []
        for row in job.chunk.rows():
            found = self._read(row, job.shape)
            if isinstance(found, Outcome):
                outcomes.append(found)
                continue
            outcome, kept, written = found
            said[len(outcomes)] = kept
            outcomes.append(outcome)
            segments.append(written)
        return self._encode(job, outcomes, said, segments)

    def _read(
        self, row: Row, shape: Shape
    ) -> Outcome | tuple[Outcome, Conversation, list[Segment]]:
        """A row's conversation and its segments, or why it is not kept."""
        bare = Outcome(row.line, row.byte)
        if row.data is None:
            return bare._replace(
                reason="bad", detail=row.problem or "", raw=row.raw or "", last=row.loses_rest
            )
        try:
            whole = shape.read(row.data)
            if not any(turn.text.strip() or turn.calls for turn in whole.turns):
                return bare._replace(reason="empty")
            kept = self._answered(whole)
            if not kept.turns:
                roles = ", ".join(turn.role for turn in whole.turns)
                return bare._replace(reason="no_answer", detail=f"its turns: {roles}")
            if any(_is_empty(turn) for turn in kept.turns):
                return bare._replace(reason="empty_answer")
            segments = self.format.segments(kept)
        except Misfit as reason:
            raw = bad_data(row.line, str(reason), row.data).raw or ""
            return bare._replace(reason="bad", detail=str(reason), raw=raw)
        left_out = whole.turns[len(kept.turns) :]
        lost = sum(self.tokens.lengths([turn.text for turn in left_out])) if left_out else 0
        mark = duplicates.signature(kept) if self.near else None
        digest = kept.digest()
        outcome = Outcome(
            row.line, row.byte, digest=digest, place=place(digest, self.seed), tokens=lost,
            unanswered=lost, turns=len(left_out), mark=mark,
        )  # fmt: skip
        return outcome, kept, segments

    def _answered(self, said: Conversation) -> Conversation:
        """Without the turns at the end that nobody answers, where only answers are learned."""
        if self.format.loss_on == "all" or conversation.is_plain(said):
            return said
        count = len(said.turns)
        while count and not (
            said.turns[count - 1].role == "assistant" and said.turns[count - 1].learned
        ):
            count -= 1
        return said._replace(turns=said.turns[:count])

    def _encode(
        self,
        job: Job,
        outcomes: list[Outcome],
        said: dict[int, Conversation],
        segments: list[list[Segment]],
    ) -> Batch:
        encoded = self.tokens.encode(segments)
        lengths = np.diff(encoded.starts)
        learned = _sums(encoded.learned, encoded.starts)
        whole = bool((lengths <= self.limit).all() and learned.all())
        pieces: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = []
        for number, (index, kept) in enumerate(said.items()):
            outcome, size = outcomes[index], int(lengths[number])
            long = size > self.limit
            outcome = outcome._replace(
                tokens=outcome.tokens + size, long=long, pieces=int(not long)
            )
            if not learned[number]:
                text = "".join(segment.text for segment in segments[number])
                shown = repr(text[:200])
                outcome = outcome._replace(reason="nothing_to_learn", detail=shown, pieces=0)
            elif outcome.long:
                fitted = self.fitter.fit(kept, *encoded.row(number), encoded.ends[number])
                outcome = _fitted(outcome, fitted)
                pieces += fitted.pieces
            elif not whole:
                pieces.append(encoded.row(number))
            outcomes[index] = outcome
        self._ask(job.ask, outcomes, said)
        if whole:
            return Batch(outcomes, encoded.ids, encoded.learned, encoded.starts)
        starts = np.cumsum([0, *(len(ids) for ids, _ in pieces)], dtype=np.int64)
        return Batch(
            outcomes,
            np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in pieces)]),
            np.concatenate([np.empty(0, bool), *(mask for _, mask in pieces)]),
            starts,
        )

    def _ask(self, share: float, outcomes: list[Outcome], said: dict[int, Conversation]) -> None:
        """Give a question to the rows that may be held out: those below `share`, and the least of all."""
        whole = [i for i in said if outcomes[i].pieces and not outcomes[i].long]
        places = {i: outcomes[i].place for i in whole if share}
        least = min(places, key=places.__getitem__, default=None)
        for index, where in places.items():
            if where < share or index == least:
                outcomes[index] = outcomes[index]._replace(prompt=self._prompt(said[index]))

    def _prompt(self, said: Conversation) -> dict[str, Any] | None:
        """The conversation up to the last answer, and that answer; None where nothing is asked."""
        answers = [i for i, turn in enumerate(said.turns) if turn.role == "assistant"]
        if not answers or not any(turn.role == "user" for turn in said.turns[: answers[-1]]):
            return None
        before = said._replace(turns=said.turns[: answers[-1]])
        try:
            text = self.format.prompt_text(before)
        except Misfit:
            return None
        return {
            "question": before.turns[-1].text.strip(),
            "prompt": text,
            "reference": said.turns[answers[-1]].text.strip(),
        } | before.dumps()


def _fitted(outcome: Outcome, fitted: Fitted) -> Outcome:
    if not fitted.pieces:
        return outcome._replace(reason="too_long", detail=f"{outcome.tokens} tokens")
    return outcome._replace(pieces=len(fitted.pieces), going_on=fitted.going_on, cut=fitted.lost)


def _is_empty(turn: conversation.Turn) -> bool:
    return turn.role == "assistant" and turn.learned and not turn.calls and not turn.text.strip()


def _sums(values: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many of each row's values are true, [rows]."""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(total[starts[1:]] - total[starts[:-1]])


def place(digest: bytes, seed: int, purpose: str = "split") -> float:
    """A number in [0, 1) that depends on a conversation and the seed alone."""
    hashed = hashlib.blake2b(digest, digest_size=8, key=f"{purpose}{seed}".encode()).digest()
    return int.from_bytes(hashed, "big") / 2**64


def copies(digest: bytes, seed: int, weight: float) -> int:
    """How often a row of a source of some weight is learned: 0.5 takes half of the rows, 2 each twice."""
    part = weight % 1
    return int(weight) + (part > 0 and place(digest, seed, "weight") < part)


def counts(batch: Batch, stops: Sequence[int]) -> tuple[npt.NDArray[np.int64], ...]:
    """Of each piece: its tokens, those learned, and whether it ends in a learned stop; int64 [pieces] each."""
    last = batch.starts[1:] - 1
    ended = np.isin(batch.ids[last], stops) & batch.learned[last]
    return np.diff(batch.starts), _sums(batch.learned, batch.starts), ended.astype(np.int64)
