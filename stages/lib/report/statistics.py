"""How sure a difference is: bootstrap over conversations, sign flips, exact counts. numpy alone.

Tokens of one conversation depend on each other, so conversations are what is drawn again.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

LEVEL = 0.95
FEWEST = 6  # conversations: of fewer no paired test can be sure at this level, nor is an interval wide enough
RESAMPLES, FLIPS = 10_000, 9_999
LEAST_RESAMPLES = 2_000
DRAWS = 20_000_000  # about so many numbers are drawn for one interval, or one p
MOST = (
    20_000  # conversations drawn one by one; more are drawn in random groups, which says the same
)
BLOCK = 4_000_000  # numbers held at a time
EXACT = 13  # conversations up to which all signs are tried


def ratio_intervals(
    numerators: Floats, denominators: Floats, seed: int, most: int = RESAMPLES
) -> list[Interval] | None:
    """Bootstrap intervals of ratios of sums, at `LEVEL`.

    Conversations are drawn with replacement. The quantiles are further out than those of the plain percentile
    interval, as Student's t is wider than the normal distribution (Hesterberg 2015, "expanded percentile").

    Args:
        numerators: [k, n], of n conversations. denominators: [n]. most: resamples.

    Returns:
        One for each of the k; None where conversations are too few.
    """
    if len(denominators) < FEWEST:
        return None
    generator = np.random.default_rng([seed, 1])
    columns = _grouped(np.vstack([numerators, denominators]), generator).T
    count = len(columns)
    found = []
    for size in _blocks(count, min(most, max(DRAWS // count, LEAST_RESAMPLES))):
        drawn = generator.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        found.append(times.astype(np.float64) @ columns)
    sums = np.concatenate(found)
    sums = sums[sums[:, -1] > 0]
    tail = NormalDist().cdf(-_student(count - 1) * math.sqrt(count / (count - 1)))
    bounds = np.quantile(sums[:, :-1] / sums[:, -1:], [tail, 1 - tail], axis=0)
    return [(float(low), float(high)) for low, high in bounds.T]


def sign_flip(differences: Sequence[float] | Floats, seed: int) -> float:
    """Two-sided p of a paired test.

    The statistic is the absolute sum of the conversations' differences [n]. If neither side were better, each
    difference would as well have had the other sign: p is the share of sign patterns whose sum is at least as
    large. Up to 13 conversations all patterns are tried, beyond that 9,999 at random and the one that was seen.
    """
    values = np.asarray(differences, np.float64)
    generator = np.random.default_rng([seed, 2])
    values = _grouped(values[None], generator)[0]
    count = len(values)
    least = abs(values.sum()) - 1e-9 * np.abs(values).sum()  # what rounding makes unequal is equal
    if count <= EXACT:
        patterns = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((1.0 - 2 * patterns) @ values) >= least).mean())
    flips = min(FLIPS, max(DRAWS // count, LEAST_RESAMPLES - 1))
    as_large = 0
    for size in _blocks(count, flips):
        bits = np.frombuffer(generator.bytes(size * -(-count // 8)), np.uint8).reshape(size, -1)
        signs = 1.0 - 2 * np.unpackbits(bits, axis=1, count=count)
        as_large += int((np.abs(signs @ values) >= least).sum())
    return (as_large + 1) / (flips + 1)


def wilson(successes: int, count: int) -> Interval | None:
    """Wilson's interval of a rate, at `LEVEL`; None of nothing."""
    if not count:
        return None
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    rate, more = successes / count, z * z / count
    half = z * math.sqrt(rate * (1 - rate) / count + more / (4 * count))
    middle, scale = rate + more / 2, 1 + more
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mcnemar(one: int, other: int) -> float:
    """Two-sided exact p of a paired rate, from how often one side alone succeeded, and the other alone."""
    count, least = one + other, min(one, other)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return float(min(1.0, 2 * tail / 2**count))


def _student(freedom: int) -> float:
    """Student's t at `LEVEL`, for at least 4 degrees of freedom (Abramowitz and Stegun 26.7.5)."""
    z, v = NormalDist().inv_cdf(0.5 + LEVEL / 2), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def _grouped(columns: Floats, generator: np.random.Generator) -> Floats:
    """Sums of conversations [k, n], or of random groups of them where n is large."""
    count = columns.shape[1]
    if count <= MOST:
        return columns
    group = generator.permutation(count) % MOST
    return np.stack([np.bincount(group, column, MOST) for column in columns])


def _blocks(width: int, total: int) -> list[int]:
    """`total` in parts of at most `BLOCK / width`."""
    most = max(1, BLOCK // width)
    return [most] * (total // most) + [total % most] * (total % most > 0)
