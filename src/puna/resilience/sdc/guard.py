"""Guards the state of a training: bitwise equal among replicas, and untouched between updates.

After every update the digests of parameters and optimiser state are compared among the ranks that
must have the same. Just before the next update each rank compares its own with those it had after
the last one: nothing but an update may change them, so a flipped bit shows on the rank that has it
even without a replica, before it can spread. What a good replica has is copied; else the run goes
back to its last good snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from puna.core.ledger import Ledger
from puna.resilience.sdc.digest import digest_all, digest_named, fold
from puna.resilience.sdc.peers import Peers
from puna.resilience.sdc.verdict import Cause, FaultyRankError, SilentCorruptionError, vote

DETECTED = "sdc.detected"
ARBITRATED = "sdc.arbitrated"
_MAX_REDONE = 2


class StateGuard:
    """Compares and heals the state of one rank; every method is called by all ranks.

    Args:
        tensors: The live state, local parts; the same names in the same order on replicas.
        peers: The ranks.
        events: Ledger; rank 0 writes what was found.
        at_rest: Look at the state before each update, too.
        gradients: The reduced gradients, to compare them among replicas before they are used; None
            to compare nothing.
        pending: From :func:`unsettled`: digests of replicas at steps that will be computed again.
        self_test: Known-answer tests of this rank; returns the names of those that failed.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        peers: Peers,
        events: Ledger,
        *,
        at_rest: bool = True,
        gradients: Callable[[], Mapping[str, Tensor]] | None = None,
        pending: Mapping[int, Mapping[int, int]] | None = None,
        self_test: Callable[[], list[str]] = list,
    ) -> None:
        self._tensors, self._peers, self._events = dict(tensors), peers, events
        self._names = list(self._tensors)
        self._at_rest, self._gradients = at_rest, gradients
        self._pending = dict(pending or {})
        self._self_test = self_test
        self._digests: np.ndarray | None = None
        self._strikes: dict[int, int] = {}
        self._disputed: list[int] | None = None
        self._n_redone = 0

    def after_update(self, step: int) -> None:
        """The state was updated: compare it among replicas, and remember it.

        Raises:
            SilentCorruptionError: Replicas differ and none is known to be right.
            FaultyRankError: A rank cannot be healed.
        """
        self._n_redone = 0
        self._disputed = None
        self._digests = digest_all(self._tensors.values())
        roots = [row[0] for row in self._peers.gather([fold(self._digests)])]
        self._arbitrate(step, roots)
        if self._differ(roots):
            self._settle_replicas(step, roots)

    def before_update(self, step: int, *, always: bool = False) -> bool:
        """Gradients are ready: look at the state at rest and at replicas' gradients.

        Args:
            step: The step.
            always: Look even where `at_rest` is off: before a replay, so that damaged parameters
                are not taken for a rank that computes wrongly.

        Returns:
            True when the step's gradients must be computed again: they came from damaged state (by
            now healed), or were damaged themselves.

        Raises:
            SilentCorruptionError: Damaged state has no good replica.
            FaultyRankError: A rank is wrong again and again.
        """
        if not (self._at_rest or always) or self._digests is None:
            return False
        changed = np.flatnonzero(digest_all(self._tensors.values()) != self._digests)
        gradients = digest_named(self._gradients()) if self._gradients else 0
        rows = self._peers.gather([len(changed), gradients])
        if any(n for n, _ in rows):
            self._heal_at_rest(step, [self._names[i] for i in changed])
            return self._again(step)
        roots = [root for _, root in rows]
        earlier, self._disputed = self._disputed, None
        if self._gradients and self._differ(roots):
            return self._dispute(step, roots, earlier)
        if earlier is not None:
            wrong = [rank for rank, root in enumerate(roots) if earlier[rank] != root]
            cause: Cause = "transient" if wrong else "software"
            self._tell(step, "gradient", cause, wrong, action="computed again")
        return False

    def _differ(self, roots: list[int]) -> bool:
        return any(len({roots[rank] for rank in ranks}) > 1 for ranks in self._peers.replicas)

    def _again(self, step: int) -> bool:
        self._n_redone += 1
        if self._n_redone > _MAX_REDONE:
            raise SilentCorruptionError(
                f"step {step} was computed {self._n_redone} times and is damaged each time"
            )
        return True

    def _dispute(self, step: int, roots: list[int], earlier: list[int] | None) -> bool:
        """Reduced gradients differ among replicas: compute them again, then say who was wrong."""
        if earlier is not None:
            bad = [
                rank
                for ranks in self._peers.replicas
                for rank in vote({rank: roots[rank] for rank in ranks}) or ()
            ]
            if not bad:
                bad = [r for r in range(len(roots)) if roots[r] != earlier[r]]
            self._tell(step, "gradient", "persistent", bad, action="stop")
            raise FaultyRankError(f"gradients of ranks {_list(bad)} differ again at step {step}")
        self._disputed = roots
        return self._again(step)

    def _heal_at_rest(self, step: int, changed: list[str]) -> None:
        """Copy tensors that nobody may have changed from replicas that still have them."""
        peers = self._peers
        of_ranks: list[list[str]] = peers.gather_any(changed)
        bad = [rank for rank, names in enumerate(of_ranks) if names]
        tensors = sorted({name for names in of_ranks for name in names})
        for ranks in peers.replicas:
            for name in sorted({name for rank in ranks for name in of_ranks[rank]}):
                good = [rank for rank in ranks if name not in of_ranks[rank]]
                if not good:
                    self._tell(step, "at rest", "undecided", bad, tensors=tensors, action="restart")
                    raise SilentCorruptionError(
                        f"{name} of rank {_list(bad)} changed at rest before the update of step "
                        f"{step}, and no replica has it"
                    )
                if peers.rank in ranks:
                    peers.copy_from(good[0], self._tensors[name])
        still = digest_all(self._tensors.values()) != self._digests
        left = [row[0] for row in peers.gather([int(still.sum())])]
        self._tell_healed(step, "at rest", bad, left, tensors)

    def _settle_replicas(self, step: int, roots: list[int]) -> None:
        """Overrule the minority and copy the majority's tensors."""
        peers, digests = self._peers, self._digests
        if digests is None:
            raise ValueError("nothing was compared")
        of_ranks: list[list[int]] = peers.gather_any(digests.tolist())
        copies: list[tuple[int, int]] = []
        bad: set[int] = set()
        found: set[int] = set()
        for ranks in peers.replicas:
            for i in range(len(of_ranks[ranks[0]])):
                values = {rank: of_ranks[rank][i] for rank in ranks}
                overruled = vote(values)
                if overruled == ():
                    continue
                found.add(i)
                if overruled is None:
                    self._give_up(step, roots, ranks, i)
                    continue
                bad |= set(overruled)
                if peers.rank in ranks:
                    copies.append((i, next(rank for rank in ranks if rank not in overruled)))
        for i, source in copies:
            peers.copy_from(source, self._tensors[self._names[i]])
        self._digests = digest_all(self._tensors.values())
        roots = [row[0] for row in peers.gather([fold(self._digests)])]
        left = [int(self._differ(roots))] * len(roots)
        self._tell_healed(
            step, "update", sorted(bad), left, [self._names[i] for i in sorted(found)]
        )

    def _give_up(self, step: int, roots: list[int], ranks: Any, tensor: int) -> None:
        self._tell(
            step, "update", "undecided", list(ranks), tensors=[self._names[tensor]],
            action="restart", roots={str(rank): f"{roots[rank]:016x}" for rank in ranks},
        )  # fmt: skip
        raise SilentCorruptionError(
            f"{self._names[tensor]} differs between replicas {_list(ranks)} after step {step}: "
            "the step is computed again from the last snapshot, which tells who was wrong"
        )

    def _tell_healed(
        self, step: int, where: str, bad: list[int], left: list[int], tensors: list[str]
    ) -> None:
        """Classify: a healed tensor that is wrong at once again is a defect of the machine."""
        failed: list[list[str]] = self._peers.gather_any(self._self_test())
        again = [rank for rank in bad if self._strikes.get(rank, 0)]
        for rank in bad:
            self._strikes[rank] = self._strikes.get(rank, 0) + 1
        is_persistent = any(left) or any(failed[rank] for rank in bad) or bool(again)
        cause: Cause = "persistent" if is_persistent else "transient"
        if len(self._strikes) > 1 and len(self._strikes) == len(left) and again:
            cause = "software"  # every rank in turn: not the machine of one
        action = "stop" if any(left) else "copied from a replica"
        self._tell(
            step, where, cause, bad, tensors=tensors, action=action,
            strikes={str(rank): self._strikes[rank] for rank in bad},
            failed_tests=sorted({name for rank in bad for name in failed[rank]}),
        )  # fmt: skip
        if any(left):
            raise FaultyRankError(f"rank {_list(bad)} does not keep what is copied to it")

    def _arbitrate(self, step: int, roots: list[int]) -> None:
        """A step is computed for the second time: whoever had another result was wrong."""
        earlier = self._pending.pop(step, None)
        if earlier is None or self._differ(roots):
            return
        bad = [rank for rank, root in sorted(earlier.items()) if roots[rank] != root]
        cause: Cause = "transient" if len(bad) < len(earlier) else "software"
        if self._peers.rank == 0:
            self._events.emit(ARBITRATED, durable=True, step=step, ranks=bad, cause=cause)

    def _tell(self, step: int, where: str, cause: Cause, ranks: list[int], **more: Any) -> None:
        if self._peers.rank == 0:
            self._events.emit(
                DETECTED, durable=True, step=step, where=where, cause=cause, ranks=list(ranks),
                **more,
            )  # fmt: skip


def unsettled(events: list[dict[str, Any]]) -> dict[int, dict[int, int]]:
    """Return the steps at which replicas differed and nobody knew who was right.

    Args:
        events: Of a job, in order, of the kinds ``sdc.detected`` and ``sdc.arbitrated``.

    Returns:
        Digest of each replica, by step.
    """
    found: dict[int, dict[int, int]] = {}
    for event in events:
        if event["kind"] == ARBITRATED:
            found.pop(event["step"], None)
        elif "roots" in event:
            found[event["step"]] = {
                int(rank): int(root, 16) for rank, root in event["roots"].items()
            }
    return found


def _list(ranks: Any) -> str:
    return ", ".join(map(str, ranks))
