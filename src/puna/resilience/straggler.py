"""Ranks that compute longer than the others: the whole job runs at their speed.

What is compared is computing alone: a rank that waits for a slow one takes as long for its step as
that one does. Each rank tells the times of its last steps in its heartbeat, so nothing is exchanged
for it. A rank is named when its median is far above the others' by their own scatter (median and
MAD, which single slow steps do not move; Hampel 1974) and by a share that is worth a look.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from puna.resilience.protocols import Heartbeat
from puna.resilience.robust import robust_sigma

WINDOW_STEPS = 16
"""Steps that are compared: for its median to be high, more than half of them must be slow."""
_LEAST_RATIO = 1.3
_LEAST_SIGMAS = 5.0
_ERROR_OF_MEDIAN = 1.2533  # of that of a mean


@dataclass(frozen=True)
class Straggler:
    """A rank that computes longer than the others.

    Attributes:
        rank: The rank.
        node: Its machine.
        step: Step that it works on.
        median_s: Of its computing in the last steps.
        others_s: Of the others: the median of theirs; of two ranks the other's.
    """

    rank: int
    node: int
    step: int
    median_s: float
    others_s: float

    @property
    def ratio(self) -> float:
        """How many times as long it computes."""
        return self.median_s / self.others_s


class StragglerDetector:
    """Names slow ranks of one attempt, each once."""

    def __init__(self) -> None:
        self._named: set[int] = set()

    def look(self, beats: Iterable[Heartbeat]) -> list[Straggler]:
        """Return ranks that are slow by now and were not named before.

        Args:
            beats: Of all ranks.
        """
        known = {beat.rank: beat for beat in beats if len(beat.compute_s) >= WINDOW_STEPS}
        found = []
        for rank in find_slow({rank: beat.compute_s for rank, beat in known.items()}):
            if rank not in self._named:
                self._named.add(rank)
                others = [b.compute_s for other, b in known.items() if other != rank]
                slow, middle_s = known[rank], statistics.median(map(statistics.median, others))
                median_s = statistics.median(slow.compute_s)
                found.append(Straggler(rank, slow.node, slow.step, median_s, middle_s))
        return found


def find_slow(times_s: dict[int, Sequence[float]]) -> list[int]:
    """Return the ranks whose steps are longer than the others', beyond all scatter.

    Args:
        times_s: Rank -> seconds of computing in each of its last steps.
    """
    if len(times_s) < 2:
        return []
    medians = {rank: statistics.median(values) for rank, values in times_s.items()}
    least_s = _LEAST_RATIO * min(medians.values())  # most ranks need no closer look
    found = []
    for rank, median_s in medians.items():
        if median_s < least_s:
            continue
        others = [value for other, value in medians.items() if other != rank]
        middle_s = statistics.median(others)
        scatter_s = max(
            robust_sigma(others, middle_s),
            statistics.median(_error(v) for other, v in times_s.items() if other != rank),
        )
        sigma_s = (scatter_s**2 + _error(times_s[rank]) ** 2) ** 0.5
        above_s = median_s - middle_s
        if above_s >= (_LEAST_RATIO - 1.0) * middle_s > 0 and above_s > _LEAST_SIGMAS * sigma_s:
            found.append(rank)
    return found


def _error(values: Sequence[float]) -> float:
    """Standard error of a median, by the scatter of its values."""
    return _ERROR_OF_MEDIAN * robust_sigma(values, statistics.median(values)) / len(values) ** 0.5


def slow_in_words(event: dict[str, Any]) -> str:
    """Tell an event ``straggler.detected`` in words."""
    return (
        f"rank {event['rank']} (node {event['node']}) computes {event['ratio']:.1f} times as long "
        f"as the others in the {event['n_steps']} steps before step {event['step']}"
    )
