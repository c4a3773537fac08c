"""What the supervisor knows about the work it watches: a job, its attempts, its heartbeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
    compute_s: Sequence[float] = ()
    """Seconds that its last steps computed, without waiting for others or for data."""


COLLECTIVE = "communication"
"""Part of a step in which a rank waits for others."""


@dataclass(frozen=True)
class Place:
    """Where a rank is inside its step."""

    rank: int
    step: int
    part: str
    """Part of the step; empty between two parts."""
    n_collectives: int
    """Collectives entered since the rank started: the number of its last one."""
    is_stopped: bool = False
    """The kernel does not run it: it got SIGSTOP, or a debugger holds it."""

    def __str__(self) -> str:
        if self.is_stopped:
            return f"rank {self.rank} is stopped by a signal"
        if self.part == COLLECTIVE:
            return f"rank {self.rank} waits in collective {self.n_collectives}"
        where = f"in its {self.part}" if self.part else "between two parts of its step"
        return f"rank {self.rank} is {where} after collective {self.n_collectives}"


class RollBackError(Exception):
    """A rank asks for the run to go on from an earlier state; newer ones are given up already."""


class PreflightError(Exception):
    """This machine failed a test before the first step; the message names the test."""


FailureKind = Literal["user", "preflight", "crash", "roll_back", "peer"]


@dataclass(frozen=True)
class Failure:
    """What a rank wrote down before it ended with an error."""

    rank: int
    step: int
    kind: FailureKind
    """``user``: bad input or environment, the same again after a restart; ``peer``: it lost contact
    with another rank, so the cause is elsewhere; ``roll_back``: all are well, and go on from an
    earlier state; ``preflight``: its machine failed a test before the first step; ``crash``: the
    rest."""
    message: str
    fix: str | None
    details: str
    """Traceback of an unexpected error."""
    t_mono_s: float
    node: int = 0
    """Machine of the rank."""


@dataclass(frozen=True)
class Fault:
    """Why an attempt ended."""

    what: str
    """A detector of :data:`puna.resilience.policy.RULES`; or ``planned``: nothing failed, the job
    wants another attempt."""
    rank: int | None
    step: int
    detect_s: float
    message: str
    fix: str | None = None
    stacks: dict[int, str] | None = None
    """Of a hang: files with the stacks of the ranks."""
    reason: str | None = None
    """What the failing rank said; the same whichever of several ranks said it first."""

    @property
    def signature(self) -> tuple[str, int, str]:
        """Equal for two faults that are the same failure at the same step."""
        told = self.what in ("crash", "exit", "preflight")
        return (self.what, self.step, (self.reason or self.message) if told else "")


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

    def places(self) -> list[Place]:
        """Where the ranks are inside their steps, as far as is known."""
        ...

    def stacks(self) -> dict[int, Path]:
        """Ask the ranks for their stacks, before they are ended; files by rank."""
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

    def blame(self, fault: Fault, attempt: int) -> bool:
        """Write down whose fault it was; tell whether the next attempt goes without that node."""
        ...

    def wants_restart(self) -> str | None:
        """Return why the attempt should end now though it has no fault; None to go on."""
        ...

    def prepare(self, attempt: int) -> None:
        """Get processes ready for an attempt that may come; again for the same one does nothing."""
        ...

    def close(self) -> None:
        """End what was prepared and not needed."""
        ...
