"""Faults on purpose: a rank is killed or frozen at a step, once in the life of a job.

The rank writes ``fault.injected`` durably into the ledger *before* it hurts itself; the ledger
decides whether the fault has happened already, so that no restart repeats it.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

from puna.core.ledger import Ledger, read_events

FaultKind = Literal["kill", "hang", "loop", "wait", "nan", "spike", "slow"]
_SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}
_KNOWN_STEPS = 16
_DRAG_S = 0.1
"""Of a rank that is slow before it has done a step."""


@dataclass(frozen=True)
class PlannedFault:
    """A fault to inject.

    Attributes:
        rank: Rank that is hit.
        step: Step (0-based) in the middle of which it is hit.
        what: ``kill`` (SIGKILL), ``hang`` (SIGSTOP), ``loop`` (computes for ever) or ``wait``
            (sleeps for ever); the last two never enter the next collective. ``nan`` and ``spike``
            damage its gradients. ``slow``: from then on its steps compute longer, by twice what
            its steps took.
    """

    rank: int
    step: int
    what: FaultKind = "kill"


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
        self._last_s: float | None = None
        self._steps_s: deque[float] = deque(maxlen=_KNOWN_STEPS)
        self._plan = plan if plan is not None and plan.rank == rank else None
        if self._plan is not None and was_injected(self._plan, job, events):
            self._plan = None

    def at(self, step: int, hurt: Callable[[str], None]) -> None:
        """Inject the fault when ``step`` is its step; most do not return then.

        Args:
            step: The step.
            hurt: Damages the gradients of this rank, by the name of the fault.
        """
        plan = self._plan
        if plan is None or plan.step != step:
            return
        self._plan = None
        self._events.emit("fault.injected", durable=True, step=step, rank=plan.rank, what=plan.what)
        if plan.what in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[plan.what])
            return
        if plan.what == "slow":
            self._is_slow = True
            return
        if plan.what in ("nan", "spike"):
            hurt(plan.what)
            return
        while True:
            if plan.what == "wait":
                time.sleep(1.0)

    def drag(self) -> None:
        """Take longer, if this rank is a slow one; called in every step, while it computes."""
        now_s = time.monotonic()
        if self._is_slow:
            time.sleep(2.0 * median(self._steps_s) if self._steps_s else _DRAG_S)
        elif self._last_s is not None:
            self._steps_s.append(now_s - self._last_s)
        self._last_s = now_s


def was_injected(plan: PlannedFault, job: str, events: Ledger) -> bool:
    """Tell from the ledger whether a job has suffered its planned fault already."""
    if events.path is None:
        return False
    return any(
        event.get("job") == job
        and (event["rank"], event["step"], event["what"]) == (plan.rank, plan.step, plan.what)
        for event in read_events(events.path, "fault.injected")
    )
