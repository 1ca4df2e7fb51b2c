"""Many answers at once, token by token, the place of one that has ended taken by the next.

The host is a step behind: it reads what was chosen while the next step runs, so an answer that has ended runs
one step too far, into room that it was given.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stages.lib.model.decoder import Decoder, logits_of
from stages.lib.model.said import Said
from stages.lib.model.sampling import Sampling, choose
from stages.lib.model.steps import Free, Row, Steps, seen_by
from stages.lib.run import preemption, watchdog
from stages.lib.run.exits import OutOfMemory

MOST, MOST_ON_CPU = 256, 16  # answers at once
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # rows of a step
READ = 8192  # tokens of prompts at a time
LAG = 1  # steps that the host is behind
SPARE = 3 * 2**30  # bytes of a GPU for all but the cache
SHARE = 0.9  # of what is free
# Mean KL from the model's own distribution on a short text, nats: a wrong mask or rotation is far off. Rounding
# alone moved a 7B with random weights by 0.003 in bf16, and by 0.11 in FP8, where a bit flips others behind it.
CLOSE = {"fp32": 1e-5, "fp8": 0.5}
CLOSE_ROUNDED = 5e-2
PROBE = 24


class Decoding:
    """Answers prompts.

    Args:
        at_once: answers at a time, at most.
    """

    def __init__(self, decoder: Decoder, how: Sampling, at_once: int | None = None) -> None:
        on_gpu = decoder.place.type == "cuda"
        self.decoder, self.how = decoder, how
        self.most = min(at_once or (MOST if on_gpu else MOST_ON_CPU), MOST)
        self.idle = _size(self.most)  # slots for rows of a step that are nobody's

    def knows(self, longest: int) -> bool:
        """Whether texts of so many tokens lie within what a token sees."""
        return self.decoder.window is None or longest <= self.decoder.window

    @torch.no_grad()
    def each(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], answers: Sequence[Said],
        adapted: bool,
    ) -> Iterator[int]:  # fmt: skip
        """Let prompts be answered; their places, as they finish.

        Args:
            prompts: token ids of each. numbers: of the prompts, on which depends what is drawn. answers: what
                is said is added to them. adapted: with the adapter, or without it.

        Raises:
            OutOfMemory: the GPU has no room for one of them.
        """
        if not prompts:
            return
        sizes = [
            len(prompt) + said.limit + LAG for prompt, said in zip(prompts, answers, strict=True)
        ]
        self.decoder.reach(max(sizes))
        self.decoder.switch(adapted)
        slots = self._slots(sizes)
        cache = self.decoder.cache(self.idle + slots)
        free = Free(self.idle, self.idle + slots)
        steps: dict[int, Steps] = {}
        waiting = deque(
            Row(place, numbers[place], prompts[place], answers[place], 0, size)
            for place, size in enumerate(sizes)
        )
        rows: list[Row] = []
        while waiting or rows:
            new = self._admitted(waiting, len(rows), free)
            self._read(new, cache)
            yield from (row.place for row in new if not row.goes_on)
            rows = _going_on([*rows, *new], free)
            if rows:
                size = _size(len(rows))
                if size not in steps:
                    steps[size] = Steps(self.decoder, cache, self.how, size)
                yield from self._go(steps[size], rows, bool(waiting))
                rows = _going_on(rows, free)

    def _admitted(self, waiting: deque[Row], already: int, free: Free) -> list[Row]:
        """Those that wait, as many as there is room for, in their order."""
        found: list[Row] = []
        while waiting and already + len(found) < self.most:
            start = free.take(waiting[0].size)
            if start is None:
                break
            found.append(waiting.popleft())
            found[-1].start = start
        return found

    def _slots(self, sizes: Sequence[int]) -> int:
        """Slots of the cache, for as many answers at a time as fit."""
        wanted = sum(sorted(sizes, reverse=True)[: self.most])
        if self.decoder.place.type != "cuda":
            return wanted
        free = torch.cuda.mem_get_info()[0]
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        one = self.decoder.cache(1)
        room = int((free - SPARE) * SHARE / (one.numel() * one.element_size()))
        if room < max(sizes) + self.idle:
            raise OutOfMemory(
                f"a prompt with its answer is {max(sizes)} tokens, the GPU has room for {max(room, 0)} beside "
                "the model; lower MAX_NEW_TOKENS, or use a base in fewer bits"
            )
        return min(wanted, room - self.idle)

    def _read(self, new: Sequence[Row], cache: torch.Tensor) -> None:
        """Read prompts, and let each answer have its first token."""
        batch: list[Row] = []
        for row in new:
            if batch and sum(len(one.prompt) for one in batch) + len(row.prompt) > READ:
                self._read_together(batch, cache)
                batch = []
            batch.append(row)
        if batch:
            self._read_together(batch, cache)

    def _read_together(self, rows: Sequence[Row], cache: torch.Tensor) -> None:
        preemption.check()
        watchdog.alive()
        place = self.decoder.place
        lengths = [len(row.prompt) for row in rows]
        ids = torch.tensor([token for row in rows for token in row.prompt], device=place)
        slots = [row.start + n for row in rows for n in range(len(row.prompt))]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(place, torch.int32)
        where = torch.tensor(slots, dtype=torch.int32, device=place)
        logits = self.decoder.read(ids, bounds, max(lengths), where, cache)
        seen = None
        if self.how.repetition_penalty != 1:
            seen = seen_by(rows, len(rows), self.decoder.words).to(place)
        numbers = torch.tensor([row.number for row in rows], dtype=torch.int32, device=place)
        chosen = choose(logits, self.how, numbers, torch.zeros_like(numbers), seen)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.goes_on = row.said.add(token)

    def _go(self, steps: Steps, rows: Sequence[Row], more: bool) -> Iterator[int]:
        """Take steps until it pays to lay the rows out anew; the places of those that end."""
        steps.begin(rows)
        alive = len(rows)
        while alive:
            preemption.check()
            watchdog.alive()
            steps.launch()
            if len(steps.under_way) <= LAG:
                continue
            for number in self._take(steps, rows):
                alive -= 1
                yield rows[number].place
            if self._pays(alive, len(rows), more):
                break
        while steps.under_way:
            for number in self._take(steps, rows):
                yield rows[number].place

    @staticmethod
    def _take(steps: Steps, rows: Sequence[Row]) -> list[int]:
        """Add a step's tokens to the answers; the numbers of those rows that end."""
        ended = []
        for number, (row, token) in enumerate(zip(rows, steps.result(), strict=False)):
            if row.goes_on:
                row.goes_on = row.said.add(token)
                if not row.goes_on:
                    steps.end(number)
                    ended.append(number)
        return ended

    @staticmethod
    def _pays(alive: int, rows: int, more: bool) -> bool:
        """Whether to lay rows out anew: places are free for others, or half of them stand still."""
        return (more and rows - alive >= max(rows // 8, 1)) or 2 * alive <= rows


def _size(rows: int) -> int:
    """Of the steps that so many rows take."""
    return next(size for size in SIZES if size >= rows)


def _going_on(rows: Sequence[Row], free: Free) -> list[Row]:
    """Those that have not ended; what the others had of the cache is free again."""
    for row in rows:
        if not row.goes_on:
            free.give(row.start, row.size)
    return [row for row in rows if row.goes_on]


@torch.no_grad()
def difference(decoder: Decoder, tuned: Any, precision: str) -> float:
    """How far a decoder is from the model that it was made of: mean KL on a short text, nats."""
    count = min(PROBE, decoder.window or PROBE)
    ids = torch.arange(3, 3 + count, device=decoder.place)
    wanted = logits_of(tuned, precision, ids)[-2:].log_softmax(-1)
    decoder.switch(adapted=True)
    found = of_text(decoder, ids).float().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def of_text(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits after the last two tokens of a text [tokens], [2, vocabulary]: one read, and one said."""
    count, cache = len(ids), decoder.cache(len(ids))
    slots = torch.arange(count, dtype=torch.int32, device=ids.device)
    bounds = torch.tensor([0, count - 1], dtype=torch.int32, device=ids.device)
    read = decoder.read(ids[:-1], bounds, count - 1, slots[:-1], cache)
    return torch.cat((read, decoder.step(ids[-1:], slots[-1:], slots[:1], slots[-1:], cache)))


def close(precision: str) -> float:
    """What `difference` may be."""
    return CLOSE.get(precision, CLOSE_ROUNDED)
