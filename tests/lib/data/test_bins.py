"""Bins: every row once an epoch, none over the edge, the same for the same seed and step."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.bins import Schedule, pack

lengths = st.lists(st.integers(1, 100), min_size=1, max_size=60).map(
    lambda v: np.array(v, np.int64)
)
seeds = st.integers(0, 2**32)


@given(lengths, seeds)
def test_every_row_is_packed_once_and_no_bin_overflows(lengths: np.ndarray, seed: int) -> None:
    bins = pack(lengths, 100, np.random.default_rng(seed))
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert all(lengths[rows].sum() <= 100 for rows in bins)


@given(lengths, seeds, seeds)
def test_how_many_bins_does_not_depend_on_the_seed(lengths: np.ndarray, one: int, two: int) -> None:
    counts = {len(pack(lengths, 100, np.random.default_rng(seed))) for seed in (one, two)}
    assert len(counts) == 1


@pytest.mark.case("E14")
@given(lengths, st.integers(1, 5), st.sampled_from([0.5, 1, 2, 3.5]), seeds)
def test_a_step_is_a_pure_function(
    lengths: np.ndarray, per_step: int, epochs: float, seed: int
) -> None:
    forwards = Schedule(lengths, 100, per_step, epochs, None, seed)
    backwards = Schedule(lengths, 100, per_step, epochs, None, seed)
    numbers = range(forwards.total_bins)
    there = [forwards.rows(n).tolist() for n in numbers]
    back = [backwards.rows(n).tolist() for n in reversed(numbers)]
    assert there == back[::-1]
    steps = [n for step in range(forwards.steps) for n in forwards.step(step)]
    assert steps == list(numbers)


def test_epochs_are_ordered_anew_and_max_steps_overrides_them() -> None:
    lengths = np.arange(1, 50)
    schedule = Schedule(lengths, 64, 2, 2, None, 0)
    n = schedule.bins_per_epoch
    first, second = ([schedule.rows(e * n + i).tolist() for i in range(n)] for e in (0, 1))
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second))
    assert Schedule(lengths, 64, 2, 1, 7, 0).steps == 7


def test_packing_is_tight_and_quick() -> None:
    import time

    lengths = np.random.default_rng(0).lognormal(5.8, 0.8, 52_000).astype(np.int64).clip(22, 2048)
    began = time.perf_counter()
    bins = pack(lengths, 8192, np.random.default_rng(0))
    assert time.perf_counter() - began < 2
    assert lengths.sum() / (len(bins) * 8192) > 0.998
