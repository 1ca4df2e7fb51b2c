"""What the loop is fed with: the bins of a run, laid out a step ahead, and where their rows come from."""

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from stages.lib.model import health
from stages.lib.model.loss import Plan, Rows, Shape, lay_out, pinned, unlearned
from stages.lib.model.ranks import Ranks


class Bins(torch.utils.data.Dataset[dict[str, Any]]):
    """The run's bins as batches; each knows its step, its place there, and the step's learned tokens.

    A thread lays out the next step's bins while this one's are computed, where the GPU can fetch them. Each of
    several processes has as many slots a step: what does not divide leaves the last ones empty, with no `bin`.
    Where each pass needs all processes, these hold a row that nobody learns from.

    Args:
        shape: see `train`. operations: of rows with these lengths and so many learned tokens.
    """

    def __init__(
        self,
        plan: Plan,
        rows: Rows,
        shape: Shape | None,
        operations: Callable[[list[int], int], int],
        ranks: Ranks,
    ) -> None:
        self.ranks, self.slots = ranks, -(-plan.bins_per_step // ranks.count)
        self.plan, self.rows, self.shape, self.operations = plan, rows, shape, operations
        self._step_tokens: tuple[int, int] = (-1, 0)
        self._ahead: dict[int, Future[dict[str, Any]]] = {}
        self._thread = ThreadPoolExecutor(1, "bins")

    def __len__(self) -> int:
        before = self.plan.steps - 1
        return before * self.slots + -(-len(self.plan.step(before)) // self.ranks.count)

    def __getitem__(self, number: int) -> dict[str, Any]:
        wanted = range(number, min(number + self.slots + 1, len(self)))
        for near in wanted:
            if near not in self._ahead:
                self._ahead[near] = self._thread.submit(self._lay_out, near)
        for passed in self._ahead.keys() - set(wanted):
            del self._ahead[passed]
        return self._ahead.pop(number).result()

    def _lay_out(self, number: int) -> dict[str, Any]:
        step, slot = divmod(number, self.slots)
        bins = self.plan.step(step)
        place = slot * self.ranks.count + self.ranks.number
        facts = {"step": step, "slot": slot, "bin": place, "step_tokens": self._tokens(step)}
        if place >= len(bins):
            idle = facts | {"bin": None, "tells": False}
            if not self.ranks.joined:
                return idle
            return pinned(lay_out([unlearned(self.rows[0])], self.shape)) | idle
        batch = lay_out([self.rows[row] for row in self.plan.rows(bins[place])], self.shape)
        return pinned(batch) | facts | {"tells": health.tells(batch)}

    def _tokens(self, step: int) -> int:
        if self._step_tokens[0] != step:
            tokens = sum(
                int(self.rows.trained[self.plan.rows(b)].sum()) for b in self.plan.step(step)
            )
            self._step_tokens = (step, tokens)
        return self._step_tokens[1]

    def work(self, step: int) -> tuple[int, int]:
        """Tokens of a step, and floating-point operations, or 0 where those are not known."""
        rows = np.concatenate([self.plan.rows(b) for b in self.plan.step(step)])
        lengths = self.rows.lengths[rows].tolist()
        return sum(lengths), self.operations(lengths, int(self.rows.trained[rows].sum()))

    def places(self, step: int, bins: Collection[int]) -> list[dict[str, Any]]:
        """Where the rows of some bins of a step come from, and the bin of each."""
        numbers = self.plan.step(step)
        return [
            {"bin": place} | self.rows.place(int(row))
            for place in bins
            for row in self.plan.rows(numbers[place])
        ]
