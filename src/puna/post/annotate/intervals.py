"""Intervals of shares, and resampling: what a rate of so few cases may really be."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

_STEPS = 60  # of the bisection: far below the spacing of floats


class Interval(NamedTuple):
    """An estimate and the bounds of its two-sided interval."""

    value: float
    low: float
    high: float


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def binomial_cdf(k: int, n: int, p: float) -> float:
    """Return the chance of at most ``k`` of ``n`` cases, each with probability ``p``."""
    if p <= 0.0 or k >= n:
        return 1.0
    if p >= 1.0 or k < 0:
        return 0.0
    yes, no = math.log(p), math.log1p(-p)
    return min(1.0, math.fsum(
        math.exp(_log_choose(n, i) + i * yes + (n - i) * no) for i in range(k + 1)
    ))  # fmt: skip


def upper_bound(k: int, n: int, confidence: float = 0.95) -> float:
    """Return the one-sided upper bound of a share (Clopper and Pearson, 1934).

    Args:
        k: Cases found.
        n: Cases looked at; with none everything is possible.
        confidence: Chance that the bound holds, at least.
    """
    if n == 0 or k >= n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if binomial_cdf(k, n, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Return a share with its exact two-sided interval (Clopper and Pearson, 1934)."""
    each = 1 - (1 - confidence) / 2
    low = 1 - upper_bound(n - k, n, each)
    return Interval(k / n if n else math.nan, low, upper_bound(k, n, each))


def wilson(k: float, n: float, confidence: float = 0.95) -> Interval:
    """Return a share with Wilson's interval (1927); ``k`` may be an expected count."""
    if n <= 0:
        return Interval(math.nan, 0.0, 1.0)
    z = NormalDist().inv_cdf(1 - (1 - confidence) / 2)
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def sample_size(limit: float, confidence: float = 0.95, n_defects: int = 0) -> int:
    """Return how many cases to look at so that ``n_defects`` among them still pass the limit.

    Args:
        limit: The upper bound must be below this share.
        confidence: Of the bound.
        n_defects: Defects that the sample may hold.
    """
    low, high = n_defects + 1, 2
    while upper_bound(n_defects, high, confidence) >= limit:
        high *= 2
    while low < high:
        middle = (low + high) // 2
        if upper_bound(n_defects, middle, confidence) < limit:
            high = middle
        else:
            low = middle + 1
    return low


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    rows: np.ndarray,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return a statistic with its percentile interval over resampled rows (Efron, 1979).

    Args:
        statistic: Of an array of rows; NaN where it is not defined, such resamples do not count.
        rows: One row per independent case, usually an item with all its ratings.
        n_resamples: More give steadier bounds.
        confidence: Of the interval.
        seed: Of the resampling.
    """
    rng = np.random.default_rng(seed)
    n = len(rows)
    values = np.array([statistic(rows[rng.integers(0, n, n)]) for _ in range(n_resamples)])
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(statistic(rows), math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(statistic(rows), float(low), float(high))
