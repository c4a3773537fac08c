"""Faults on purpose: a rank is killed, frozen or damaged at a step, once in the life of a job.

The rank writes ``fault.injected`` durably into the ledger *before* it hurts itself; the ledger
decides whether the fault has happened already, so that no restart repeats it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import stat
import time
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Literal, get_args

from puna.core.ledger import Ledger, read_events

Silent = Literal[
    "flip-weight", "flip-optimizer", "flip-gradient", "flip-activation", "flip-data", "stuck"
]
"""What is wrong with the numbers of a rank and looks right. ``flip-...``: one bit, at rest before
the step (weights, optimiser state, batch), in what a layer gives, or in the gradients after their
sum. ``stuck``: what a layer gives is wrong from then on."""
Damage = Literal["nan", "spike"] | Silent
"""``nan``, ``spike``: its gradients are no number, or far too large."""
FaultKind = Literal["kill", "hang", "loop", "wait", "slow", "cut", "memory", "full-disk"] | Damage
SILENT: tuple[str, ...] = get_args(Silent)
DAMAGES = ("nan", "spike", *SILENT)
_SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}
_KNOWN_STEPS = 16
_DRAG_S = 0.1
"""Of a rank that is slow before it has done a step."""
_FULL_AT_BYTES = 1 << 16
_MORE_THAN_THERE_IS = 1 << 40


@dataclass(frozen=True)
class PlannedFault:
    """A fault to inject.

    Attributes:
        rank: Rank that is hit.
        step: Step (0-based) in the middle of which it is hit.
        what: ``kill`` (SIGKILL), ``hang`` (SIGSTOP), ``loop`` (computes for ever) or ``wait``
            (sleeps for ever); the last two never enter the next collective. ``slow``: from then on
            its steps compute longer, by twice what its steps took. ``cut``: its connections end.
            ``memory``: it asks for more than there is. ``full-disk``: it can write no file of over
            64 KiB during ``steps``. The rest is a :data:`Damage`.
        steps: How long a full disk stays full.
    """

    rank: int
    step: int
    what: FaultKind = "kill"
    steps: int = 4


class FaultInjector:
    """Hits this process when its planned fault is due.

    Args:
        plan: The fault; None for none.
        rank: Rank of this process.
        job: Id of the job: a fault counts as done when this job's ledger holds it.
        events: The ledger.
    """

    def __init__(self, plan: PlannedFault | None, rank: int, job: str, events: Ledger) -> None:
        self._events = events
        self._is_slow = False
        self._full_until: int | None = None
        self._last_s: float | None = None
        self._steps_s: deque[float] = deque(maxlen=_KNOWN_STEPS)
        self._plan = plan if plan is not None and plan.rank == rank else None
        if self._plan is not None and was_injected(self._plan, job, events):
            self._plan = None

    def take(self, step: int) -> FaultKind | None:
        """Return the fault that is due in a step, once; it is in the ledger then."""
        if self._full_until is not None and step >= self._full_until:
            self._full_until = None
            _limit_files(resource.RLIM_INFINITY)
        plan = self._plan
        if plan is None or plan.step != step:
            return None
        self._plan = None
        self._events.emit("fault.injected", durable=True, step=step, rank=plan.rank, what=plan.what)
        if plan.what == "full-disk":
            self._full_until = step + plan.steps
            _limit_files(_FULL_AT_BYTES)
        return plan.what

    def strike(self, what: FaultKind | None) -> None:
        """Do to this process what a fault does; does not return from most.

        Raises:
            MemoryError: The fault was ``memory``.
        """
        if what in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[what])
        elif what == "slow":
            self._is_slow = True
        elif what == "cut":
            _cut_connections()
        elif what == "memory":
            _run_out_of_memory()
        # One that was stopped is continued for its stacks, which another thread may write.
        while what in ("loop", "wait", "hang"):
            if what != "loop":
                time.sleep(1.0)

    def drag(self) -> None:
        """Take longer, if this rank is a slow one; called in every step, while it computes."""
        now_s = time.monotonic()
        if self._is_slow:
            time.sleep(2.0 * median(self._steps_s) if self._steps_s else _DRAG_S)
        elif self._last_s is not None:
            self._steps_s.append(now_s - self._last_s)
        self._last_s = now_s


def _limit_files(n_bytes: int) -> None:
    """Let this process write no larger file; Python ignores the signal, so that writing raises."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))


def _cut_connections() -> None:
    """End the TCP connections of this process, both ways, as seen from both sides."""
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # it was the listing's own, or has no other side
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as ours:
                if ours.family in (socket.AF_INET, socket.AF_INET6):
                    ours.shutdown(socket.SHUT_RDWR)


def _run_out_of_memory() -> None:
    """Give this process no more than it asks for now, and ask for more.

    Raises:
        MemoryError: Always.
    """
    resource.setrlimit(resource.RLIMIT_AS, (_MORE_THAN_THERE_IS, _MORE_THAN_THERE_IS))
    bytearray(_MORE_THAN_THERE_IS)


def was_injected(plan: PlannedFault, job: str, events: Ledger) -> bool:
    """Tell from the ledger whether a job has suffered its planned fault already."""
    if events.path is None:
        return False
    return any(
        event.get("job") == job
        and (event["rank"], event["step"], event["what"]) == (plan.rank, plan.step, plan.what)
        for event in read_events(events.path, "fault.injected")
    )
