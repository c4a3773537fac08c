"""Who was wrong, and why: votes over copies, and what re-execution says.

Re-execution in place, then elsewhere, tells a transient fault from a persistent one and from
software that does not repeat itself, as the rerun state machine of Megatron-LM does for the loss
(megatron/core/rerun_state_machine.py); here it is bitwise, and sees every wrong bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Cause = Literal["transient", "persistent", "software", "undecided"]


class SilentCorruptionError(RuntimeError):
    """State or gradients are wrong and cannot be healed in place; the last good snapshot can."""


class FaultyRankError(SilentCorruptionError):
    """A rank computes wrongly again and again; it needs another machine."""


@dataclass(frozen=True)
class Verdict:
    """What a disagreement came to.

    Attributes:
        cause: ``transient``: re-executed, it is right; ``persistent``: the rank is wrong again;
            ``software``: the code does not repeat itself, on healthy ranks either; ``undecided``:
            the ranks stand by different answers and none has a majority.
        bad: Ranks that were wrong; under ``undecided`` those that may be.
    """

    cause: Cause
    bad: tuple[int, ...]


def vote(values: Mapping[int, int]) -> tuple[int, ...] | None:
    """Return the ranks that a majority overrules; None without a majority.

    Args:
        values: Digest of each rank.
    """
    (value, n), *_ = Counter(values.values()).most_common(1)
    if 2 * n <= len(values):
        return None
    return tuple(rank for rank, own in sorted(values.items()) if own != value)


def judge(first: Mapping[int, int], again: Mapping[int, Sequence[int]]) -> Verdict:
    """Judge a disagreement by re-execution.

    Args:
        first: What the ranks that disagree had computed.
        again: What each rank, those and maybe others, gets for the same when it computes it again,
            as often as it did.

    Raises:
        ValueError: Nothing was re-executed.
    """
    if not again or not all(again.values()):
        raise ValueError("a verdict needs what re-execution gave")
    steady = {rank: values[0] for rank, values in again.items() if len(set(values)) == 1}
    unsteady = tuple(sorted(set(again) - set(steady)))
    if len(unsteady) > 1 and 2 * len(unsteady) > len(again):
        return Verdict("software", unsteady)
    overruled = vote(steady) if steady else None
    if overruled is None:
        return Verdict("undecided", tuple(sorted(set(first) | set(again))))
    truth = next(value for rank, value in steady.items() if rank not in overruled)
    if overruled or unsteady:
        return Verdict("persistent", tuple(sorted({*overruled, *unsteady})))
    wrong = tuple(rank for rank, value in sorted(first.items()) if value != truth)
    return Verdict("transient", wrong) if wrong else Verdict("software", ())
