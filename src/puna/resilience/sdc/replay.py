"""Another rank computes the same: the only look at gradients before they are summed.

Replicas apply the same sum, so a wrong summand is the same everywhere and no comparison of state
sees it. At every ``every``-th step each rank computes one micro-batch of another rank, from the
same parameters, and the digests of the gradients are compared: code, threads and machine type are
equal, so all bits must be. The partner changes each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from puna.core.ledger import Ledger
from puna.resilience.sdc.guard import DETECTED
from puna.resilience.sdc.peers import Peers
from puna.resilience.sdc.verdict import FaultyRankError, Verdict, judge

Compute = Callable[[int, int], int]
"""``(step, rank)``: compute the audited micro-batch of a rank and return its gradient's digest;
leaves no gradient behind. Called by all ranks together."""
_TIMES_AGAIN = 2


class ReplayCheck:
    """Compares micro-batches among ranks; every method is called by all ranks.

    Args:
        every: Steps between two comparisons.
        peers: The ranks.
        compute: Computes a micro-batch.
        events: Ledger; rank 0 writes.
        self_test: Known-answer tests of this rank; returns the names of those that failed.
    """

    def __init__(
        self,
        every: int,
        peers: Peers,
        compute: Compute,
        events: Ledger,
        *,
        self_test: Callable[[], list[str]] = list,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} is no number of steps")
        self._every, self._peers, self._compute = every, peers, compute
        self._events, self._self_test = events, self_test

    def is_due(self, step: int) -> bool:
        """Tell whether a step's first micro-batch is compared."""
        return step % self._every == 0

    def partner(self, step: int, rank: int, n_ranks: int) -> int:
        """Return the rank whose micro-batch a rank computes; never itself, where there are two."""
        if n_ranks == 1:
            return 0
        return (rank + 1 + step // self._every % (n_ranks - 1)) % n_ranks

    def check(self, step: int, own: int, n_ranks: int) -> bool:
        """Compare.

        Args:
            step: The step.
            own: Digest of the gradient of this rank's audited micro-batch, as it was trained on.
            n_ranks: All ranks.

        Returns:
            True when a gradient that was summed is wrong, and the step must be computed again.

        Raises:
            FaultyRankError: A rank is wrong each time that it computes.
        """
        peers = self._peers
        of = self.partner(step, peers.rank, n_ranks)
        rows = peers.gather([own, self._compute(step, of)])
        checker = {self.partner(step, rank, n_ranks): rank for rank in range(n_ranks)}
        wrong = [rank for rank in range(n_ranks) if rows[rank][0] != rows[checker[rank]][1]]
        if not wrong:
            return False
        must_redo = False
        # A rank that is always wrong disagrees as owner and as checker: settle each dispute.
        for rank in wrong:
            first = {rank: rows[rank][0], checker[rank]: rows[checker[rank]][1]}
            again = [self._compute(step, rank) for _ in range(_TIMES_AGAIN)]
            table = peers.gather(again)
            verdict = judge(first, dict(enumerate(table)))
            failed: list[list[str]] = peers.gather_any(self._self_test())
            if verdict.cause == "undecided" and (bad := [r for r in verdict.bad if failed[r]]):
                verdict = Verdict("persistent", tuple(bad))
            self._tell(step, rank, verdict, failed)
            if verdict.cause in ("persistent", "undecided"):
                raise FaultyRankError(_say(step, verdict))
            must_redo = must_redo or rank in verdict.bad or not verdict.bad
        return must_redo

    def _tell(self, step: int, owner: int, verdict: Verdict, failed: list[Any]) -> None:
        if self._peers.rank == 0:
            self._events.emit(
                DETECTED, durable=True, step=step, where="replay", cause=verdict.cause,
                ranks=list(verdict.bad), micro_batch_of=owner,
                action="stop" if verdict.cause in ("persistent", "undecided") else "computed again",
                failed_tests=sorted({name for rank in verdict.bad for name in failed[rank]}),
            )  # fmt: skip


def _say(step: int, verdict: Verdict) -> str:
    ranks = ", ".join(map(str, verdict.bad))
    if verdict.cause == "persistent":
        return f"rank {ranks} computes wrong gradients, each time (step {step})"
    return f"ranks {ranks} compute different gradients, each time (step {step}); one is defective"
