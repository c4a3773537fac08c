"""Scatter that single outliers do not move."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

_SIGMA_PER_MAD = 1.4826  # of a normal distribution


def robust_sigma(values: Iterable[float], middle: float) -> float:
    """Return a standard deviation by the median of distances from the median (Hampel 1974).

    Args:
        values: At least one.
        middle: Their median.
    """
    return _SIGMA_PER_MAD * statistics.median(abs(value - middle) for value in values)
