"""Weights that change over a run, and sources that may be read a limited number of times.

Both become weights that change at given rows, known before the run starts; which row a source gets
is then the matter of :mod:`.mixing`, and a batch stays a pure function of its step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Literal

from puna.core.errors import PunaError
from puna.core.units import format_count
from puna.tokens.mixing import check_weights, limit_denominator
from puna.tokens.ramp import Ramp

Shares = Mapping[str, Fraction]
"""Source -> share of the rows; the shares sum to 1."""
UsedUp = Literal["refuse", "share"]

BLEND_STAIRS = 64
"""Most stairs of a blend: between them its weights stand still."""
_STAIR_DENOMINATOR = 2**16


@dataclass(frozen=True)
class Phase:
    """Weights from a step on.

    Attributes:
        first_step: First step with these weights, or of the blend towards them.
        weights: Source -> weight; 0 leaves a source out.
        blend_steps: Steps over which the weights before move to these, in a straight line.
    """

    first_step: int
    weights: Mapping[str, float]
    blend_steps: int = 0


@dataclass(frozen=True)
class Curriculum:
    """How the mix of sources changes over a run.

    Attributes:
        phases: In the order of their first steps, which are above 0.
        max_epochs: Source -> passes over it, at most; a source that is not named has no limit.
        used_up: What happens when a source has been read so often: the run is refused before it
            starts, or the others share what it had.
        n_steps: Steps of the run; None when it has no end (then nothing can be refused).
    """

    phases: Sequence[Phase] = ()
    max_epochs: Mapping[str, float] = field(default_factory=dict)
    used_up: UsedUp = "refuse"
    n_steps: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values of which :meth:`of` makes this curriculum again."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Curriculum:
        """Read the JSON values of :meth:`to_json`."""
        phases = [Phase(**phase) for phase in values["phases"]]
        return cls(phases, values["max_epochs"], values["used_up"], values["n_steps"])


@dataclass(frozen=True)
class Supply:
    """What a source has.

    Attributes:
        n_tokens: Tokens of one pass, repeated documents counted each time.
        max_epochs: Passes, at most; None for any number.
    """

    n_tokens: int
    max_epochs: float | None = None

    def max_rows(self, seq_len: int) -> int | None:
        """Return how many whole rows may be made of it; None for any number."""
        if self.max_epochs is None:
            return None
        return int(Fraction(str(self.max_epochs)) * self.n_tokens / seq_len)


def plan_weights(
    weights: Mapping[str, float] | None,
    curriculum: Curriculum,
    n_tokens: Mapping[str, int],
    where: str,
    *,
    seq_len: int,
    ramp: Ramp,
) -> list[tuple[int, Shares]]:
    """Return from which row on which shares hold, the first from row 0.

    Args:
        weights: Before the first phase; None weighs sources by their tokens.
        curriculum: What changes.
        n_tokens: Source -> tokens of one pass.
        where: What the sources belong to, for messages.
        seq_len: Tokens of a row.
        ramp: Rows of each step.

    Raises:
        PunaError: Weights that do not fit the sources; phases that are out of order or overlap; a
            source would be read more often than it may be, or all are used up before the end.
    """
    stretches: list[tuple[int, Shares]] = [(0, check_weights(weights, n_tokens, where))]
    for number, phase in enumerate(curriculum.phases, 1):
        _check_order(curriculum, number)
        before = stretches[-1][1]
        after = check_weights(phase.weights, n_tokens, f"{where}, phase {number}")
        first = phase.first_step
        n_stairs = min(phase.blend_steps, BLEND_STAIRS)
        for stair in range(n_stairs):
            step = first + phase.blend_steps * stair // n_stairs
            shares = _between(before, after, Fraction(2 * stair + 1, 2 * n_stairs))
            stretches.append((ramp.rows_before(step), shares))
        stretches.append((ramp.rows_before(first + phase.blend_steps), after))
    for source in curriculum.max_epochs:
        if source not in n_tokens:
            known = ", ".join(sorted(n_tokens)) or "(none)"
            raise PunaError(f"max_epochs of an unknown source {source!r}", f"{where} has: {known}")
    supplies = {s: Supply(n, curriculum.max_epochs.get(s)) for s, n in n_tokens.items()}
    n_rows = None if curriculum.n_steps is None else ramp.rows_before(curriculum.n_steps)
    if curriculum.used_up == "share":
        return _share_used_up(stretches, supplies, n_rows, seq_len)
    _refuse_used_up(stretches, supplies, n_rows, seq_len)
    return stretches


def _check_order(curriculum: Curriculum, number: int) -> None:
    phase, earlier = curriculum.phases[number - 1], curriculum.phases[: number - 1]
    least = earlier[-1].first_step + earlier[-1].blend_steps + 1 if earlier else 1
    if phase.first_step < least or phase.blend_steps < 0:
        raise PunaError(
            f"phase {number} begins at step {phase.first_step}, but the weights before it last to "
            f"step {least - 1}",
            f"start phase {number} at step {least} or later, or shorten what is before it",
        )
    if curriculum.n_steps is not None and phase.first_step >= curriculum.n_steps:
        raise PunaError(
            f"phase {number} begins at step {phase.first_step}, after the last of "
            f"{curriculum.n_steps} steps",
            "start it earlier, or remove it",
        )


def _between(before: Shares, after: Shares, part: Fraction) -> Shares:
    mixed = {
        source: (1 - part) * before.get(source, Fraction(0)) + part * after.get(source, Fraction(0))
        for source in sorted({*before, *after})
    }
    return limit_denominator(mixed, _STAIR_DENOMINATOR)


def _refuse_used_up(
    stretches: Sequence[tuple[int, Shares]],
    supplies: Mapping[str, Supply],
    n_rows: int | None,
    seq_len: int,
) -> None:
    """Raise when a source would be read more often than it may be."""
    if n_rows is None:
        return
    ends = [*(first for first, _ in stretches[1:]), n_rows]
    for source, supply in supplies.items():
        most = supply.max_rows(seq_len)
        if most is None:
            continue
        wanted = sum(
            (min(end, n_rows) - first) * shares.get(source, Fraction(0))
            for (first, shares), end in zip(stretches, ends, strict=True)
            if first < n_rows
        )
        if wanted > most:
            n_wanted = int(wanted * seq_len)
            raise PunaError(
                f"source {source!r} has {format_count(supply.n_tokens)} tokens and may be read "
                f"{supply.max_epochs:g} times, but this run reads {format_count(n_wanted)} tokens "
                f"of it: {n_wanted / supply.n_tokens:.2f} epochs",
                f"lower its weight, train less, raise max_epochs of {source!r}, or set "
                'used_up = "share" to give its share to the other sources',
            )


def _share_used_up(
    stretches: Sequence[tuple[int, Shares]],
    supplies: Mapping[str, Supply],
    n_rows: int | None,
    seq_len: int,
) -> list[tuple[int, Shares]]:
    """Cut stretches where a source is used up; from there on the others have its share."""
    limits = {source: supply.max_rows(seq_len) for source, supply in supplies.items()}
    used = dict.fromkeys(supplies, Fraction(0))
    gone: set[str] = set()
    planned: list[tuple[int, Shares]] = []
    ends = [*(first for first, _ in stretches[1:]), None]
    for (first, shares), end in zip(stretches, ends, strict=True):
        at = first
        while end is None or at < end:
            left = {source: share for source, share in shares.items() if source not in gone}
            if not left:
                _check_enough(at, n_rows, gone, seq_len)
                return planned
            total = sum(left.values(), Fraction(0))
            now = limit_denominator({source: share / total for source, share in left.items()})
            # an expected number of rows up to the limit keeps the real one, which is a whole
            # number less than one above it, within the limit
            rows = {
                source: int((limit - used[source]) / share)
                for source, share in now.items()
                if (limit := limits[source]) is not None
            }
            until = min(rows.values(), default=None)
            reach = end if until is None else at + until if end is None else min(end, at + until)
            if reach is None or reach > at:
                planned.append((at, now))
            if reach is None:
                return planned
            for source, share in now.items():
                used[source] += (reach - at) * share
            at = reach
            gone |= {source for source, n in rows.items() if n == until and at != end}
    return planned


def _check_enough(row: int, n_rows: int | None, gone: set[str], seq_len: int) -> None:
    if n_rows is None or row < n_rows:
        wanted = "" if n_rows is None else f" of the {format_count(n_rows * seq_len)} of this run"
        names = ", ".join(map(repr, sorted(gone)))
        raise PunaError(
            f"all sources ({names}) are used up after {format_count(row * seq_len)} tokens{wanted}",
            "train less, raise max_epochs, or bring more documents",
        )
