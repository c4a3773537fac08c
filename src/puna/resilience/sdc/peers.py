"""The ranks as the checks see them: a number for each, and copies of the same state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_LEAVE_S = 0.2


class Peers(Protocol):
    """What the checks need of the ranks; every method is called by all of them."""

    @property
    def rank(self) -> int:
        """Number of this one."""
        ...

    @property
    def replicas(self) -> Sequence[Sequence[int]]:
        """Ranks that have the same state, of every state; each rank is in one of these sets."""
        ...

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return numbers below 2^64 of every rank; as many on each."""
        ...

    def gather_any(self, value: Any) -> list[Any]:
        """Return a value of every rank."""
        ...

    def copy_from(self, source: int, x: Tensor) -> None:
        """Overwrite a tensor with that of a rank of the same set; called by that set only."""
        ...


@dataclass(frozen=True)
class GroupPeers:
    """Ranks of the default process group.

    Attributes:
        device: Where collectives want their tensors.
        replicas: See :class:`Peers`.
        replica_group: Process group of this rank's set; None for a set of one.
    """

    device: torch.device
    replicas: Sequence[Sequence[int]]
    replica_group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return dist.get_rank()

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return numbers of every rank, by one small collective."""
        signed = [value - (1 << 64) if value >= 1 << 63 else value for value in values]
        own_N = torch.tensor(signed, dtype=torch.int64, device=self.device)
        every: list[Tensor] = [torch.empty_like(own_N) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own_N)
        return [[value % (1 << 64) for value in row] for row in torch.stack(every).tolist()]

    def gather_any(self, value: Any) -> list[Any]:
        """Return a value of every rank."""
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, value)
        return every

    def copy_from(self, source: int, x: Tensor) -> None:
        """Overwrite a tensor with that of a rank of the same set."""
        if self.replica_group is None:
            raise ValueError("a rank without replicas cannot be healed from one")
        dist.broadcast(x, src=source, group=self.replica_group)


class Alone:
    """One rank without a process group."""

    rank = 0
    replicas: Sequence[Sequence[int]] = ((0,),)

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return the numbers of the only rank."""
        return [list(values)]

    def gather_any(self, value: Any) -> list[Any]:
        """Return the value of the only rank."""
        return [value]

    def copy_from(self, source: int, x: Tensor) -> None:
        """There is nobody to copy from."""
        raise ValueError("one rank alone cannot be healed from another")


class ThreadPeers:
    """Ranks that are threads of one process, for trials; barriers stand for collectives.

    Args:
        rank: Of this thread.
        meeting: Shared by all of them.
        replicas: See :class:`Peers`; one set of all by default.
    """

    def __init__(
        self, rank: int, meeting: Meeting, replicas: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.rank, self._meeting = rank, meeting
        self.replicas = replicas or [list(range(len(meeting.values)))]

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return the numbers of all threads."""
        return self.gather_any(list(values))

    def gather_any(self, value: Any) -> list[Any]:
        """Return the values of all threads."""
        meeting = self._meeting
        meeting.values[self.rank] = value
        meeting.barrier.wait()
        values = list(meeting.values)
        meeting.barrier.wait()
        return values

    def copy_from(self, source: int, x: Tensor) -> None:
        """Overwrite a tensor; with one set of all, all threads are here."""
        values = self.gather_any(x.detach().clone() if self.rank == source else None)
        with torch.no_grad():
            x.copy_(values[source])


class Meeting:
    """Where threads leave values for one another.

    Args:
        n_ranks: Threads.
    """

    def __init__(self, n_ranks: int) -> None:
        self.values: list[Any] = [None] * n_ranks
        self.barrier = threading.Barrier(n_ranks, timeout=60)


def run_threads(n_ranks: int, function: Callable[[ThreadPeers], Any]) -> list[Any]:
    """Call a function on every rank; return the results, or raise the first rank's error.

    Args:
        n_ranks: Threads.
        function: Gets the peers of its rank.
    """
    meeting = Meeting(n_ranks)

    def run(rank: int) -> Any:
        try:
            return function(ThreadPeers(rank, meeting))
        except BaseException:
            # A little later: others may still be taking what the last meeting gave them.
            threading.Timer(_LEAVE_S, meeting.barrier.abort).start()
            raise

    with ThreadPoolExecutor(n_ranks) as pool:
        ranks = [pool.submit(run, rank) for rank in range(n_ranks)]
    errors = [error for error in (rank.exception() for rank in ranks) if error is not None]
    if errors:
        # Threads that waited for the one that failed only know that it did not come.
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return [rank.result() for rank in ranks]
