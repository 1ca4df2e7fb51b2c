"""Steps of many answers at once: each has its own part of one cache, and a step of all is one graph."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stages.lib.model.decoder import Decoder
from stages.lib.model.said import Said
from stages.lib.model.sampling import Sampling, choose


class Free:
    """Parts of a cache that nobody has.

    Args:
        first, last: its bounds.
    """

    def __init__(self, first: int, last: int) -> None:
        self.parts = [(first, last)]

    def take(self, size: int) -> int | None:
        """The beginning of a part of that size; None where there is none."""
        for number, (first, last) in enumerate(self.parts):
            if last - first >= size:
                self.parts[number : number + 1] = [(first + size, last)] * (last - first > size)
                return first
        return None

    def give(self, first: int, size: int) -> None:
        """Take a part back."""
        joined: list[tuple[int, int]] = []
        for begin, end in sorted([*self.parts, (first, first + size)]):
            if joined and joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((begin, end))
        self.parts = joined


@dataclass
class Row:
    """An answer in the making: its place among the prompts, its prompt, and its part of the cache."""

    place: int
    number: int
    prompt: Sequence[int]
    said: Said
    start: int
    size: int
    goes_on: bool = True

    def state(self) -> list[int]:
        """What the next step needs to know of it, see `Steps`."""
        behind = len(self.prompt) + len(self.said.ids) - 1
        place = len(self.said.ids)
        return [self.said.ids[-1], behind, self.start, self.start + behind, self.number, place, 1]


class Steps:
    """Steps of `size` rows.

    Attributes:
        state: int32 [7, size]: the last token, its position, the first and the last slot of its text, the
            prompt's number, the place of the token to come, and whether the answer goes on.
    """

    def __init__(self, decoder: Decoder, cache: torch.Tensor, how: Sampling, size: int) -> None:
        self.decoder, self.cache, self.how, self.size = decoder, cache, how, size
        place = decoder.place
        self.state = torch.zeros(7, size, dtype=torch.int32, device=place)
        self.idle = torch.zeros(7, size, dtype=torch.int32)
        self.idle[2] = self.idle[3] = torch.arange(size)  # each has a slot of its own to write to
        self.state.copy_(self.idle)
        self.seen = None
        if how.repetition_penalty != 1:
            self.seen = torch.zeros(size, decoder.words, dtype=torch.bool, device=place)
        self.on_gpu = place.type == "cuda"
        self.read = [torch.empty(size, dtype=torch.int32, pin_memory=self.on_gpu) for _ in "ab"]
        self.graph = self._record() if self.on_gpu else None
        self.under_way: deque[tuple[torch.Tensor, Any]] = deque()
        self.taken = 0

    def _record(self) -> Any:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._advance()  # compiles what is not yet compiled
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph

    def _advance(self) -> None:
        ids, positions, starts, slots, numbers, places, alive = self.state
        logits = self.decoder.step(ids, positions, starts, slots, self.cache)
        chosen = choose(logits, self.how, numbers, places, self.seen)
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        ids.copy_(chosen)
        positions += alive
        slots += alive
        places += alive

    def begin(self, rows: Sequence[Row]) -> None:
        """Let these rows be the first ones, and the others idle."""
        state = self.idle.clone()
        state[:, : len(rows)] = torch.tensor([row.state() for row in rows], dtype=torch.int32).t()
        self.state.copy_(state)
        if self.seen is not None:
            self.seen.copy_(seen_by(rows, self.size, self.decoder.words))

    def launch(self) -> None:
        """Let the device take a step."""
        if self.graph:
            self.graph.replay()
        else:
            self._advance()
        target = self.read[self.taken % len(self.read)]
        target.copy_(self.state[0], non_blocking=True)
        event = torch.cuda.Event() if self.on_gpu else None
        if event:
            event.record()
        self.under_way.append((target, event))
        self.taken += 1

    def result(self) -> list[int]:
        """The tokens of the oldest step that was launched and not asked for, [size]."""
        target, event = self.under_way.popleft()
        if event:
            event.synchronize()
        return [int(token) for token in target.tolist()]

    def end(self, row: int) -> None:
        """Let a row stand still."""
        self.state[6, row].zero_()


def seen_by(rows: Sequence[Row], size: int, words: int) -> torch.Tensor:
    """Tokens that prompts and answers have, bool [size, words]."""
    found = torch.zeros(size, words, dtype=torch.bool)
    for number, row in enumerate(rows):
        found[number, [*row.prompt, *row.said.ids]] = True
    return found
