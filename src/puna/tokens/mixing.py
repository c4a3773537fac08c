"""Which source each row of training comes from: exact proportions at every prefix.

Random draws give each source its share only on average; the first thousand rows of a run can be off
by dozens. Here the rows are *assigned*: after N rows each source has been used N*w times with an
error below 1, for every N at once. This is the chairman assignment problem; Tijdeman (1980, "The
chairman assignment problem", Discrete Mathematics 32) gives the algorithm used here and proves the
error to be at most 1 - 1/(2k-2) for k sources.

Weights are taken as exact fractions with a common denominator D, so that the assignment repeats
after a few times D rows and the source of *any* row, however far, is found from those. Weights may
change at given rows; the theorem holds for weights that change with every row, provided that the
deadlines below are those of the weights to come.
"""

from __future__ import annotations

import bisect
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from puna.core.errors import PunaError

_SIGHT_PERIODS = 4
"""Periods before a change of weights in which it may decide about rows."""
MAX_DENOMINATOR = 2**20
"""Largest period; weights that need a larger one are rounded to multiples of 2**-20."""
NEVER = 1e300
"""Rows until the deadline of a source that has no weight any more."""
_FINE = 2**30
"""Units of a row, at least, in which the state is handed from one set of weights to the next."""
_GROW_ROWS = 4096
_COMPILE_ROWS = 100_000
"""From this many rows at once on the loop is compiled, which takes a second."""


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
    return limit_denominator({source: part / total for source, part in parts.items()})


def limit_denominator(
    exact: Mapping[str, Fraction], most: int = MAX_DENOMINATOR
) -> dict[str, Fraction]:
    """Return positive shares that sum to 1, as they are or rounded to multiples of ``1/most``."""
    if math.lcm(*(part.denominator for part in exact.values())) <= most:
        return dict(exact)
    # largest remainder; a positive weight keeps at least one row per period
    units = {source: max(1, int(part * most)) for source, part in exact.items()}
    by_rest = sorted(exact, key=lambda source: units[source] - exact[source] * most)
    spare = most - sum(units.values())
    for source in by_rest[: max(spare, 0)]:
        units[source] += 1
    if spare < 0:  # only when shares below 1/most were raised
        units[max(units, key=lambda source: units[source])] += spare
    return {source: Fraction(n, most) for source, n in units.items()}


class Assignment:
    """The source of every row, and how many rows each source had before it.

    Args:
        weights: Source -> share, fractions that sum to 1 (see :func:`check_weights`).
        changes: (row, weights from that row on), rows ascending. A source that is left out from a
            row on gets at most the one row more that it was short of.
    """

    def __init__(
        self,
        weights: Mapping[str, Fraction],
        changes: Sequence[tuple[int, Mapping[str, Fraction]]] = (),
    ) -> None:
        stretches = [(0, weights), *changes]
        for _, shares in stretches:
            if not shares or sum(shares.values()) != 1 or min(shares.values()) <= 0:
                raise ValueError("weights must be positive fractions that sum to 1")
        firsts = [first for first, _ in stretches]
        if firsts != sorted(set(firsts)):
            raise ValueError(f"weights change at rows {firsts[1:]}, which do not ascend from 1")
        self.sources = sorted({source for _, shares in stretches for source in shares})
        self.weights = dict(weights)
        self._pieces = _pieces(stretches, self.sources)
        self._pieces[0].start([0] * len(self.sources), np.zeros(len(self.sources), np.int64))
        self._firsts = [piece.first for piece in self._pieces]

    def rows(self, first: int, n: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return, for rows first..first+n-1, the source's index and the row's number within it."""
        source_n = np.empty(n, np.int64)
        number_n = np.empty(n, np.int64)
        counts = self.counts(first)
        for at in range(n):
            piece = self._piece(first + at)
            choice = piece.choice(first + at - piece.first)
            source_n[at], number_n[at] = choice, counts[choice]
            counts[choice] += 1
        return source_n, number_n

    def counts(self, n_rows: int) -> Int64[np.ndarray, " k"]:
        """Return how many of the first ``n_rows`` rows each source has."""
        piece = self._piece(n_rows)
        return piece.counts(n_rows - piece.first)

    def _piece(self, row: int) -> _Piece:
        """Return the piece that holds a row; the pieces before it are computed to their ends."""
        index = bisect.bisect_right(self._firsts, row) - 1
        for at in range(1, index + 1):
            piece = self._pieces[at]
            if not piece.started:
                before = self._pieces[at - 1]
                n_rows = piece.first - before.first
                deficits = _convert(before.deficits(n_rows), before.whole, piece.whole)
                piece.start(deficits, before.counts(n_rows))
        return self._pieces[index]


def _pieces(
    stretches: Sequence[tuple[int, Mapping[str, Fraction]]], sources: Sequence[str]
) -> list[_Piece]:
    """Cut stretches of rows into pieces that repeat and pieces in which a change is in sight."""
    spans: list[tuple[int, int | None, int, list[int]]] = []
    changes = len(stretches) > 1
    ends = [first for first, _ in stretches[1:]]
    for (first, shares), end in zip(stretches, [*ends, None], strict=True):
        period = math.lcm(*(share.denominator for share in shares.values()))
        whole = period * max(1, _FINE // period) if changes else period
        units = [int(shares.get(source, Fraction(0)) * whole) for source in sources]
        if end is not None and end - first > _SIGHT_PERIODS * period:
            # deadlines are at most two periods away, so before this border the change is not felt
            border = end - _SIGHT_PERIODS * period
            spans.append((first, None, period, units))
            spans.append((border, end - border, period, units))
        else:
            spans.append((first, None if end is None else end - first, period, units))
    pieces, rates, rows = [], [], []
    following = [first for first, *_ in spans[1:]]
    for at in range(len(spans) - 1, -1, -1):
        first, n_rows, period, units = spans[at]
        pieces.append(_Piece(first, n_rows, period, units, rates[::-1], rows[::-1]))
        rates.append([unit / sum(units) for unit in units])
        rows.append(following[at] - first if at < len(following) else math.inf)
    return pieces[::-1]


def _convert(deficits: Sequence[int], whole: int, new_whole: int) -> list[int]:
    """Express deficits in another unit, of which `new_whole` are a row; their sum stays 0."""
    converted = [deficit * new_whole // whole for deficit in deficits]
    by_rest = sorted(range(len(deficits)), key=lambda i: -(deficits[i] * new_whole % whole))
    for i in by_rest[: -sum(converted)]:
        converted[i] += 1
    return converted


class _Piece:
    """Rows with the same weights, assigned as they are asked for.

    Args:
        first: Its first row.
        n_rows: Rows after which other weights come into sight; None when they never do: then the
            assignment repeats as soon as a state comes back.
        period: D, after which constant weights have given each source whole rows.
        units: Weight of each source, as whole numbers; their sum is a multiple of D.
        rates: Rows per row of each source in the pieces that follow.
        rows: Number of rows of those pieces.
    """

    def __init__(
        self, first: int, n_rows: int | None, period: int, units: list[int],
        rates: list[list[float]], rows: list[float],
    ) -> None:  # fmt: skip
        self.first, self.whole, self.started = first, sum(units), False
        self._period, self._n_rows = period, n_rows
        self._units, self._rates, self._rows = units, rates, rows
        self._choices = np.empty(0, np.int32)
        self._cycle: tuple[int, int] | None = None
        self._known: dict[tuple[int, ...], int] = {}

    def start(self, deficits: list[int], counts: Int64[np.ndarray, " k"]) -> None:
        """Give the state before the first row.

        Args:
            deficits: How far each source lags, in rows times :attr:`whole`; their sum is 0.
            counts: Rows of each source so far.
        """
        self.started = True
        self._first_deficits, self._last = list(deficits), list(deficits)
        self._counts = [np.zeros(len(deficits), np.int64)]
        self._before = counts
        if self._n_rows is None:
            self._known[tuple(deficits)] = 0

    def choice(self, offset: int) -> int:
        """Return the source of a row, counted from the first of the piece."""
        inside, _ = self._inside(offset + 1)
        return int(self._choices[inside - 1])

    def counts(self, offset: int) -> Int64[np.ndarray, " k"]:
        """Return the rows of each source before a row, all pieces together."""
        inside, n_cycles = self._inside(offset)
        counts = self._before + self._inner_counts(inside)
        if n_cycles and self._cycle is not None:
            begin, length = self._cycle
            counts += n_cycles * (self._inner_counts(begin + length) - self._inner_counts(begin))
        return counts

    def deficits(self, offset: int) -> list[int]:
        """Return how far each source lags before a row, in rows times :attr:`whole`."""
        inside, _ = self._inside(offset)
        counts = self._inner_counts(inside).tolist()
        return [
            deficit + inside * unit - self.whole * count
            for deficit, unit, count in zip(self._first_deficits, self._units, counts, strict=True)
        ]

    def _inner_counts(self, inside: int) -> Int64[np.ndarray, " k"]:
        block, tail = divmod(inside, _GROW_ROWS)
        start = block * _GROW_ROWS
        return self._counts[block] + np.bincount(
            self._choices[start : start + tail], minlength=len(self._units)
        )

    def _inside(self, offset: int) -> tuple[int, int]:
        """Return the equal row inside the known part, and the cycles between the two."""
        while len(self._choices) < offset and self._cycle is None:
            self._grow(offset)
        if self._cycle is None or offset <= len(self._choices):
            return offset, 0
        begin, length = self._cycle
        n_cycles, rest = divmod(offset - begin - 1, length)
        return begin + rest + 1, n_cycles

    def _grow(self, n_rows: int) -> None:
        """Extend the known part by one period, or less when fewer rows will do."""
        done = len(self._choices)
        n_new = -(-(n_rows - done) // _GROW_ROWS) * _GROW_ROWS
        if self._n_rows is None:
            n_new = min(n_new, -(-self._period // _GROW_ROWS) * _GROW_ROWS)
        else:
            n_new = min(n_new, self._n_rows - done)
        choices = self._assigned(n_new)
        for start in range(0, n_new, _GROW_ROWS):
            block = np.bincount(choices[start : start + _GROW_ROWS], minlength=len(self._units))
            self._counts.append(self._counts[-1] + block)
        self._choices = np.concatenate([self._choices, choices])
        if self._n_rows is None:
            self._find_cycle(done)

    def _find_cycle(self, done: int) -> None:
        first = -(-(done + 1) // self._period) * self._period
        for offset in range(first, len(self._choices) + 1, self._period):
            counts = self._inner_counts(offset).tolist()
            state = tuple(
                deficit + offset * unit - self.whole * count
                for deficit, unit, count in zip(
                    self._first_deficits, self._units, counts, strict=True
                )
            )
            begin = self._known.setdefault(state, offset)
            if begin != offset:
                self._cycle = begin, offset - begin
                return

    def _assigned(self, n_new: int) -> Int32[np.ndarray, " n"]:
        left = math.inf if self._n_rows is None else self._n_rows - len(self._choices)
        values = (self._last, self._units, self._rates, self._rows)
        choices = [0] * n_new
        if n_new < _COMPILE_ROWS:
            _assign(*values, self.whole, left, choices)
            return np.array(choices, np.int32)
        found = np.empty(n_new, np.int32)
        last, units = (np.array(value, np.int64) for value in values[:2])
        rates = np.array(self._rates, np.float64).reshape(-1, len(self._units))
        rows = np.array(self._rows, np.float64)
        _compiled()(last, units, rates, rows, self.whole, float(left), found)
        self._last = last.tolist()
        return found


@functools.cache
def _compiled() -> Any:
    from puna.data.kernels.buffers import kernel

    return kernel(_assign)


def _assign(
    deficits: Any, units: Any, rates: Any, rows: Any, whole: int, left: float, choices: Any
) -> None:
    """Fill ``choices`` with the next rows (Tijdeman); also compiled, so plain loops only.

    Of the sources that lag by at least 1/(2k-2) rows, the one takes the row that will be the first
    to lag by 1 - 1/(2k-2).

    Args:
        deficits: How far each source lags, in rows times ``whole``; left as at the end.
        units: Weight of each source; their sum is ``whole``.
        rates: Weights in the pieces that follow.
        rows: Their numbers of rows.
        whole: Units of a row.
        left: Rows up to the first of those pieces.
        choices: Receives the index of the source of each row.
    """
    k = len(units)
    scale = 2 * (k - 1)
    for at in range(len(choices)):
        best, soonest, found = 0, 0.0, False
        ahead = left - at - 1
        for i in range(k):
            deficits[i] += units[i]
            if k == 1 or scale * deficits[i] < whole:
                continue
            slack = (scale - 1) * whole - scale * deficits[i]
            wait = slack / (scale * units[i]) if units[i] > 0 else NEVER
            if wait > ahead:
                rest = (slack / scale - units[i] * ahead) / whole
                wait, piece = ahead, 0
                while piece < len(rows):
                    rate = rates[piece][i]
                    if rate > 0 and rest <= rate * rows[piece]:
                        break
                    rest -= rate * rows[piece] if rate > 0 else 0.0
                    wait += rows[piece]
                    piece += 1
                wait += rest / rates[piece][i] if piece < len(rows) else NEVER
            if not found or wait < soonest:
                best, soonest, found = i, wait, True
        deficits[best] -= whole
        choices[at] = best
