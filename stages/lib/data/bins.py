"""How rows become batches: packed by length alone into bins, bins shared out to optimizer steps.

A bin is what one forward and backward pass sees; a step is a whole number of bins. Which bins a step sees
depends on the seed and the step alone, never on the number of GPUs: this is what makes resume exact.
"""

import bisect
import functools
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stages.lib.run.exits import BadSetting

Ints = npt.NDArray[np.int64]


def pack(lengths: Ints, capacity: int, generator: np.random.Generator) -> list[Ints]:
    """Best fit decreasing: put each row, longest first, into the fullest bin that still has room.

    Args:
        lengths: tokens of each row, [rows]. capacity: tokens that a bin holds; no row may be longer.
        generator: breaks ties between rows of one length, and orders the bins.

    Returns:
        The row numbers of each bin, in random order. How many bins there are depends on `lengths` alone.
    """
    order = generator.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for row in order.tolist():
        length = int(lengths[row])
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            free, number = capacity, len(bins)
            bins.append([])
        else:
            free, number = room.pop(place)
        bins[number].append(row)
        bisect.insort(room, (free - length, number))
    return [np.array(bins[i], dtype=np.int64) for i in generator.permutation(len(bins))]


def check_sizes(batch_tokens: int, bin_tokens: int | None, longest: int, sharing: int = 1) -> None:
    """Refuse a bin that does not divide a step, is shorter than the longest row, or leaves a GPU without any.

    Args:
        sharing: the GPUs that share a step.

    Raises:
        BadSetting: so it is.
    """
    name, size = (
        ("MICRO_BATCH_TOKENS", bin_tokens) if bin_tokens else ("BATCH_TOKENS", batch_tokens)
    )
    if size < longest:
        raise BadSetting(f"{name} {size} is less than the longest row, {longest} tokens; raise it")
    if batch_tokens % size:
        raise BadSetting(
            f"BATCH_TOKENS {batch_tokens} is no multiple of MICRO_BATCH_TOKENS {size}; make it one"
        )
    least = sharing * (bin_tokens or longest)
    if sharing > 1 and batch_tokens < least:
        raise BadSetting(
            f"BATCH_TOKENS {batch_tokens} has no pass of {bin_tokens or longest} tokens for each of {sharing} "
            f"GPUs; raise it to {least} at the least, or lower MICRO_BATCH_TOKENS, MAX_LENGTH or NUM_GPUS"
        )


class Schedule:
    """The bins of a whole run, in order; epochs follow one another without a gap.

    Args:
        lengths: tokens of each row, [rows].
        capacity: tokens of a bin (`MICRO_BATCH_TOKENS`).
        bins_per_step: bins of an optimizer step (`BATCH_TOKENS / MICRO_BATCH_TOKENS`).
        epochs: passes over the rows; may be a fraction. max_steps: overrides `epochs`, if given.
        seed: of the order.
    """

    def __init__(
        self,
        lengths: Ints,
        capacity: int,
        bins_per_step: int,
        epochs: float,
        max_steps: int | None,
        seed: int,
    ) -> None:
        self.lengths, self.capacity, self.bins_per_step, self.seed = (
            lengths,
            capacity,
            bins_per_step,
            seed,
        )
        self._epoch = functools.lru_cache(2)(self._pack)  # two, for whoever prepares the next one
        self.bins_per_epoch = len(self._epoch(0))
        wanted = max(1, round(self.bins_per_epoch * epochs))
        self.total_bins = max_steps * bins_per_step if max_steps else wanted

    def _pack(self, epoch: int) -> list[Ints]:
        return pack(self.lengths, self.capacity, np.random.default_rng([self.seed, epoch]))

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the run; the last may have fewer bins."""
        return -(-self.total_bins // self.bins_per_step)

    @cached_property
    def filled(self) -> float:
        """Share of the bins' room that rows fill."""
        return float(self.lengths.sum() / (self.bins_per_epoch * self.capacity))

    def rows(self, number: int) -> Ints:
        """The rows of bin `number` of the run."""
        epoch, index = divmod(number, self.bins_per_epoch)
        return self._epoch(epoch)[index]

    def step(self, number: int) -> range:
        """The bins of optimizer step `number`, counted from 0."""
        first = number * self.bins_per_step
        return range(first, min(first + self.bins_per_step, self.total_bins))
