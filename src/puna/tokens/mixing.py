"""Which source each row of training comes from: exact proportions at every prefix.

Random draws give each source its share only on average; the first thousand rows of a run can be off
by dozens. Here the rows are *assigned*: after N rows each source has been used N*w times with an
error below 1, for every N at once. This is the chairman assignment problem; Tijdeman (1980, "The
chairman assignment problem", Discrete Mathematics 32) gives the algorithm used here and proves the
error to be at most 1 - 1/(2k-2) for k sources.

Weights are taken as exact fractions with a common denominator D, so that the assignment repeats
after D rows and the source of *any* row, however far, is found from one period.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from puna.core.errors import PunaError

MAX_DENOMINATOR = 2**20
"""Largest period; weights that need a larger one are rounded to multiples of 2**-20."""
_GROW_ROWS = 4096


def check_weights(
    weights: Mapping[str, float] | None, n_tokens: Mapping[str, int], where: str
) -> dict[str, Fraction]:
    """Check weights against the sources that exist and make them exact.

    Args:
        weights: Source -> weight, any positive scale; 0 leaves a source out. None weighs each
            source by its tokens, which repeats all of them equally often.
        n_tokens: Tokens of each source.
        where: What the sources belong to, for messages.

    Returns:
        The sources with a positive weight, sorted by name, as fractions that sum to 1 and have a
        common denominator of at most :data:`MAX_DENOMINATOR`.

    Raises:
        PunaError: A source is unknown, has no weight, no tokens, or its weight is no number >= 0;
            or all weights are 0.
    """
    if weights is None:
        weights = {source: n for source, n in n_tokens.items() if n}
        if not weights:
            raise PunaError(f"{where} holds no tokens", "check the split and the filters before it")
    known = ", ".join(sorted(n_tokens)) or "(none)"
    for source, weight in weights.items():
        if source not in n_tokens:
            raise PunaError(f"weight of an unknown source {source!r}", f"{where} has: {known}")
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise PunaError(f"weight of source {source!r} is {weight!r}, not a number >= 0",
                            "give every source a weight of 0 or more")  # fmt: skip
        if weight > 0 and n_tokens[source] == 0:
            raise PunaError(f"source {source!r} has weight {weight} but no tokens in {where}",
                            f"set the weight of {source!r} to 0, or bring documents")  # fmt: skip
    missing = sorted(source for source, n in n_tokens.items() if n and source not in weights)
    if missing:
        raise PunaError(f"no weight for source {', '.join(map(repr, missing))} of {where}",
                        f"add `{missing[0]} = ...`; 0 leaves a source out")  # fmt: skip
    positive = {source: weights[source] for source in sorted(weights) if weights[source] > 0}
    if not positive:
        raise PunaError(f"all weights of {where} are 0", "give at least one source a weight > 0")
    return _exact(positive)


def _exact(weights: Mapping[str, float]) -> dict[str, Fraction]:
    # str() gives the decimal that the user wrote: 0.1 is one tenth, not its nearest binary number
    parts = {source: Fraction(str(weight)) for source, weight in weights.items()}
    total = sum(parts.values(), Fraction(0))
    exact = {source: part / total for source, part in parts.items()}
    if math.lcm(*(part.denominator for part in exact.values())) <= MAX_DENOMINATOR:
        return exact
    # largest remainder; a positive weight keeps at least one row per period
    units = {source: max(1, int(part * MAX_DENOMINATOR)) for source, part in exact.items()}
    by_rest = sorted(exact, key=lambda source: units[source] - exact[source] * MAX_DENOMINATOR)
    spare = MAX_DENOMINATOR - sum(units.values())
    for source in by_rest[: max(spare, 0)]:
        units[source] += 1
    if spare < 0:  # only when weights below 2**-20 were raised
        units[max(units, key=lambda source: units[source])] += spare
    return {source: Fraction(n, MAX_DENOMINATOR) for source, n in units.items()}


class Assignment:
    """The source of every row, and how many rows each source had before it.

    Args:
        weights: Source -> share, fractions that sum to 1 (see :func:`check_weights`).
    """

    def __init__(self, weights: Mapping[str, Fraction]) -> None:
        if not weights or sum(weights.values()) != 1 or min(weights.values()) <= 0:
            raise ValueError("weights must be positive fractions that sum to 1")
        self.sources = list(weights)
        self.weights = dict(weights)
        self.period_rows = math.lcm(*(share.denominator for share in weights.values()))
        self._units = [int(share * self.period_rows) for share in weights.values()]
        # deficits[i] = N * units[i] - period * count[i]: how far source i lags, in 1/period rows
        self._deficits = [0] * len(self._units)
        self._choices = np.empty(0, np.int32)
        self._counts = [np.zeros(len(self._units), np.int64)]

    def rows(self, first: int, n: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return, for rows first..first+n-1, the source's index and the row's number within it."""
        source_n = np.empty(n, np.int64)
        number_n = np.empty(n, np.int64)
        counts = self.counts(first)
        for at in range(n):
            inside = (first + at) % self.period_rows
            self._grow(inside + 1)
            choice = self._choices[inside]
            source_n[at], number_n[at] = choice, counts[choice]
            counts[choice] += 1
        return source_n, number_n

    def counts(self, n_rows: int) -> Int64[np.ndarray, " k"]:
        """Return how many of the first ``n_rows`` rows each source has."""
        periods, rest = divmod(n_rows, self.period_rows)
        self._grow(rest)
        block, tail = divmod(rest, _GROW_ROWS)
        start = block * _GROW_ROWS
        inside = self._counts[block] + np.bincount(
            self._choices[start : start + tail], minlength=len(self._units)
        )
        return inside + periods * np.array(self._units, np.int64)

    def _grow(self, n_rows: int) -> None:
        """Extend the known part of the period to at least ``n_rows`` rows, block by block."""
        while len(self._choices) < n_rows:
            n_block = min(_GROW_ROWS, self.period_rows - len(self._choices))
            block = np.array([self._choose() for _ in range(n_block)], np.int32)
            self._choices = np.concatenate([self._choices, block])
            last = self._counts[-1] + np.bincount(block, minlength=len(self._units))
            self._counts.append(last)

    def _choose(self) -> int:
        """Take the source whose deadline comes first among those that lag enough (Tijdeman)."""
        k, period = len(self._units), self.period_rows
        if k == 1:
            return 0
        # all numbers times 2(k-1): eligible when the lag is at least 1/(2k-2); deadline when it
        # would pass 1 - 1/(2k-2)
        scale = 2 * (k - 1)
        best, best_rows = -1, (0, 1)
        for i, unit in enumerate(self._units):
            self._deficits[i] += unit
            if scale * self._deficits[i] >= period:
                slack = (scale - 1) * period - scale * self._deficits[i]
                if best < 0 or slack * best_rows[1] < best_rows[0] * unit:
                    best, best_rows = i, (slack, unit)
        self._deficits[best] -= period
        return best
