"""Intervals and tests of differences, against known cases, exact enumeration and simulated data."""

import itertools
import math
import time

import numpy as np
import pytest

from stages.lib.report import statistics
from stages.lib.report.statistics import mcnemar, ratio_intervals, sign_flip, wilson


def drawn(seed: int, count: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Differences in nats and learned tokens of conversations of very unequal length, both [count]."""
    generator = np.random.default_rng(seed)
    tokens = np.ceil(generator.lognormal(4, 0.8, count))
    return tokens * (generator.normal(shift, 0.3, count)), tokens


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_of_few_conversations_all_signs_are_tried(count: int) -> None:
    differences, _ = drawn(count, count)
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=count)
    ]
    wanted = sum(s >= abs(differences.sum()) - 1e-9 for s in sums) / 2**count
    assert sign_flip(differences, 0) == wanted
    assert wanted >= 2 / 2**count


def test_few_conversations_cannot_be_certain() -> None:
    assert sign_flip([-100.0], 0) == 1
    assert sign_flip([-100.0, -90.0], 0) == 0.5
    assert sign_flip([-100.0] * 5, 0) == 2 / 32
    for count in range(statistics.FEWEST):
        assert ratio_intervals(np.full((1, count), -9.0), np.ones(count), 0) is None


def test_signs_at_random_come_near_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    differences, _ = drawn(3, 13, shift=0.15)
    exact = sign_flip(differences, 0)
    monkeypatch.setattr(statistics, "EXACT", 0)
    assert 0.01 < exact < 0.5
    assert sign_flip(differences, 0) == pytest.approx(exact, abs=0.015)
    assert sign_flip(differences, 0) == sign_flip(differences, 0) != sign_flip(differences, 1)


@pytest.mark.parametrize("count", [1, 4, 13, 14, 300])
def test_an_adapter_that_changes_nothing_has_p_1(count: int) -> None:
    assert sign_flip(np.zeros(count), 0) == 1
    _, tokens = drawn(0, count)
    found = ratio_intervals(np.zeros((1, count)), tokens, 0)
    assert found == (None if count < statistics.FEWEST else [(0, 0)])


def test_what_is_clear_has_the_least_p() -> None:
    differences, _ = drawn(0, 50, shift=-2)
    assert sign_flip(differences, 0) == 1 / (statistics.FLIPS + 1)


def test_without_a_difference_one_in_twenty_is_taken_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "FLIPS", 399)
    for count in (8, 25):
        rejected = [sign_flip(drawn(seed, count)[0], seed) <= 0.05 for seed in range(400)]
        assert 0.02 < np.mean(rejected) < 0.08  # 0.05 within three standard errors


@pytest.mark.parametrize(("count", "least"), [(6, 0.88), (10, 0.91), (40, 0.92)])
def test_intervals_hold_the_truth(count: int, least: float) -> None:
    """Of unequal conversations: in 90, 95 and 95 % of these; the plain percentile interval in 79, 87 and 94."""
    held = []
    for seed in range(300):
        differences, tokens = drawn(seed, count, shift=-0.2)
        ((low, high),) = ratio_intervals(differences[None], tokens, seed, most=1000)
        held.append(low <= -0.2 <= high)
    assert least < np.mean(held) < 0.995


def test_an_interval_is_that_of_the_formula_where_there_are_many() -> None:
    differences, tokens = drawn(1, 4000, shift=-0.2)
    ((low, high),) = ratio_intervals(differences[None], tokens, 0)
    ratio = differences.sum() / tokens.sum()
    spread = np.sqrt(((differences - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert (low, high) == pytest.approx((ratio - 1.96 * spread, ratio + 1.96 * spread), abs=0.001)
    assert ratio_intervals(differences[None], tokens, 0) == [(low, high)]
    assert ratio_intervals(differences[None], tokens, 1) != [(low, high)]


def test_several_ratios_share_their_draws() -> None:
    differences, tokens = drawn(1, 30)
    both = ratio_intervals(np.stack([differences, 2 * differences]), tokens, 0)
    assert both is not None
    assert both[1] == pytest.approx([2 * bound for bound in both[0]])


def test_very_many_conversations_are_grouped_and_cost_seconds() -> None:
    differences, tokens = drawn(2, 60_000, shift=0.002)
    began = time.process_time()
    ((low, high),) = ratio_intervals(differences[None], tokens, 0)
    p = sign_flip(differences, 0)
    assert time.process_time() - began < 10
    ratio = differences.sum() / tokens.sum()
    spread = np.sqrt(((differences - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert (low, high) == pytest.approx(
        (ratio - 1.96 * spread, ratio + 1.96 * spread), abs=0.2 * spread
    )
    z = abs(differences.sum()) / np.sqrt((differences**2).sum())
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.03)


@pytest.mark.parametrize(
    ("successes", "count", "wanted"),
    [(0, 10, (0, 0.2775)), (8, 8, (0.6756, 1)), (5, 10, (0.2366, 0.7634)), (81, 263, (0.2553, 0.3662))],
)  # fmt: skip
def test_wilson(successes: int, count: int, wanted: tuple[float, float]) -> None:
    """The last is the example of Newcombe (1998)."""
    assert wilson(successes, count) == pytest.approx(wanted, abs=1e-4)
    assert wilson(0, 0) is None


@pytest.mark.parametrize(
    ("one", "other", "p"), [(0, 0, 1), (1, 0, 1), (0, 6, 2 / 64), (3, 3, 1), (1, 9, 22 / 1024)]
)
def test_mcnemar(one: int, other: int, p: float) -> None:
    assert mcnemar(one, other) == mcnemar(other, one) == p


@pytest.mark.parametrize(
    ("freedom", "t"), [(4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (10**6, 1.96)]
)
def test_students_t(freedom: int, t: float) -> None:
    assert statistics._student(freedom) == pytest.approx(t, abs=0.01)
