"""What the supervisor knows about the work it watches: a job, its attempts, its heartbeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Phase = Literal["start", "step", "eval", "save", "done"]
"""What a rank is busy with: imports and initialisation, steps, a checkpoint, nothing any more."""


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of one rank; written at every change of phase and at every step."""

    rank: int
    pid: int
    step: int
    """Step that the rank works on (0-based); during ``start`` the step it will begin with."""
    phase: Phase
    t_mono_s: float
    """Monotonic clock of the machine, in seconds."""
    node: int = 0
    """Machine of the rank."""


@dataclass(frozen=True)
class Failure:
    """What a rank wrote down before it ended with an error."""

    rank: int
    step: int
    kind: Literal["user", "crash", "peer"]
    """``user``: bad input or environment, the same again after a restart; ``peer``: it lost contact
    with another rank, so the cause is elsewhere; ``crash``: the rest."""
    message: str
    fix: str | None
    details: str
    """Traceback of an unexpected error."""
    t_mono_s: float
    node: int = 0
    """Machine of the rank."""


class Attempt(Protocol):
    """One running attempt of a job: a tree of processes."""

    def poll(self) -> int | None:
        """Exit code of the root process; None while it runs."""
        ...

    def kill(self) -> None:
        """End every process of the tree at once and wait until they are gone."""
        ...

    def heartbeats(self) -> list[Heartbeat]:
        """The last heartbeat of each rank that has written one."""
        ...

    def failures(self) -> list[Failure]:
        """What failing ranks wrote down."""
        ...

    def log_tail(self) -> str:
        """Where the processes printed to, and the last lines of it."""
        ...


class Job(Protocol):
    """Work that can be started again and then continues from its last checkpoint."""

    @property
    def n_ranks(self) -> int:
        """Number of ranks that an attempt has."""
        ...

    def start(self, attempt: int) -> Attempt:
        """Start an attempt (numbered from 0 over the whole life of the job)."""
        ...
