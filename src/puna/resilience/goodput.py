"""Goodput from the ledger: every second of a job's wall time belongs to exactly one bucket.

The events of a job, in the order of the ledger, cut its life into segments. A segment is charged
to what the event at its *end* reports as finished (a step, a checkpoint, a restart ...), so the
buckets sum to the wall time by construction. Time is the monotonic clock; when the machine was
rebooted between two events, the wall clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

BUCKETS = (
    "productive", "recomputed", "checkpoint", "data", "evaluation", "detection", "restart_init",
    "preflight", "other", "stopped",
)  # fmt: skip
"""``productive``: steps done for the first time. ``recomputed``: steps done again after a rollback,
the part of a step that a fault cut off, and steps that were thrown away because their numbers could
not be right. ``checkpoint``: saving, while no step runs. ``data``:
steps that waited for their batch. ``evaluation``: measuring held-out text.
``detection``: from a fault until it is noticed. ``restart_init``: starting processes, imports,
building, loading. ``preflight``: tests before the first step. ``other``: writing the final model
and the like. ``stopped``: nothing ran, because the whole run was killed and started again later."""

_CHARGED_TO = {
    "attempt.start": "restart_init",
    "attempt.crew": "restart_init",
    "world.changed": "restart_init",
    "recovery.start": "restart_init",
    "recovery.done": "restart_init",
    "train.start": "restart_init",
    "train.restore": "restart_init",
    "train.checkpoint": "checkpoint",
    "train.snapshot": "checkpoint",
    "train.eval": "evaluation",
    "train.anomaly": "recomputed",
    "train.skip": "recomputed",
    "fault.injected": "recomputed",
}
_ASIDE = (
    "straggler.detected", "health.warning", "train.predicted", "train.deviation",
    "train.deviation_over",
)  # fmt: skip


@dataclass
class Goodput:
    """Where the time of a job went.

    Attributes:
        wall_s: From the first to the last event, in seconds.
        buckets: Bucket -> seconds; the values sum to ``wall_s``.
        faults: One entry per detected fault: ``what, rank, step, detect_s``, and, once recovered,
            ``recover_s`` (detection to the first new step) and ``steps_lost``.
        n_attempts: Attempts that were started.
        n_steps: Steps done, each counted once.
        n_recomputed: Steps done again.
    """

    wall_s: float = 0.0
    buckets: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))
    faults: list[dict[str, Any]] = field(default_factory=list)
    n_attempts: int = 0
    n_steps: int = 0
    n_recomputed: int = 0

    @property
    def goodput(self) -> float:
        """Share of productive time, without the time in which nothing was running (0 to 1)."""
        running_s = self.wall_s - self.buckets["stopped"]
        return self.buckets["productive"] / running_s if running_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: ``wall_s, goodput, buckets, faults, n_attempts, ...``."""
        return {
            "wall_s": self.wall_s,
            "goodput": self.goodput,
            "buckets": dict(self.buckets),
            "faults": [dict(fault) for fault in self.faults],
            "n_attempts": self.n_attempts,
            "n_steps": self.n_steps,
            "n_recomputed": self.n_recomputed,
        }


def job_goodput(events: Iterable[dict[str, Any]], job: str | None = None) -> Goodput:
    """Account for the time of one job.

    Args:
        events: Events of a ledger in file order (:func:`puna.core.ledger.read_events`).
        job: Id of the job; the last job in the ledger when None.

    Returns:
        The account; all zero when the ledger holds no such job.
    """
    own = [event for event in events if event.get("job") is not None]
    if job is None and own:
        job = own[-1]["job"]
    found = Goodput()
    previous: dict[str, Any] | None = None
    for event in own:
        if event["job"] != job or is_aside(event):
            continue
        if previous is not None:
            seconds = elapsed_s(previous, event)
            found.wall_s += seconds
            _charge(found, event, seconds)
        _count(found, event)
        previous = event
    return found


def is_aside(event: dict[str, Any]) -> bool:
    """Tell whether an event ends nothing: somebody noticed something while a step ran on."""
    return event["kind"] in _ASIDE or (
        event["kind"] == "fault.injected" and event.get("what") == "slow"
    )


def elapsed_s(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Seconds between two events; never negative, whatever the clocks did."""
    mono_s = after["t_mono_s"] - before["t_mono_s"]
    if mono_s >= 0:
        return mono_s
    # The monotonic clock restarts at boot. (Two processes that log in the same instant can also
    # swap their lines; the wall clock then gives a tiny value as well.)
    return max(0.0, after["t_wall_s"] - before["t_wall_s"])


def _charge(found: Goodput, event: dict[str, Any], seconds: float) -> None:
    kind, buckets = event["kind"], found.buckets
    if kind == "train.step":
        n_steps = event.get("n_steps", 1)
        data_s = min(seconds, n_steps * event.get("data_s", 0.0))
        share = _n_again(found, event) / n_steps
        buckets["data"] += data_s
        buckets["recomputed"] += (seconds - data_s) * share
        buckets["productive"] += (seconds - data_s) * (1 - share)
    elif kind == "fault.detected":
        detection_s = min(seconds, max(0.0, event["detect_s"]))
        buckets["detection"] += detection_s
        buckets["recomputed"] += seconds - detection_s
    elif kind == "preflight.done":
        preflight_s = min(seconds, max(0.0, event["seconds"]))
        buckets["preflight"] += preflight_s
        buckets["restart_init"] += seconds - preflight_s
    elif kind == "job.start":
        buckets["stopped"] += seconds
    else:
        buckets[_CHARGED_TO.get(kind, "other")] += seconds


def _n_again(found: Goodput, event: dict[str, Any]) -> int:
    """How many of the steps that an event covers had been done before."""
    n_steps = event.get("n_steps", 1)
    return max(0, min(n_steps, found.n_steps - (event["step"] - n_steps + 1)))


def _count(found: Goodput, event: dict[str, Any]) -> None:
    kind = event["kind"]
    if kind == "train.step":
        found.n_recomputed += _n_again(found, event)
        found.n_steps = max(found.n_steps, event["step"] + 1)
    elif kind == "attempt.start":
        found.n_attempts += 1
    elif kind == "fault.detected":
        keys = ("what", "rank", "step", "detect_s", "message", "attempt", "t_wall_s")
        found.faults.append({key: event.get(key) for key in keys})
    elif kind == "recovery.done" and found.faults:
        found.faults[-1]["recover_s"] = event["seconds"]
        found.faults[-1]["steps_lost"] = event["steps_lost"]
