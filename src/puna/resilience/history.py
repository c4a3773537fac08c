"""What the ledger knows about a job that was started before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puna.core.ledger import read_events


@dataclass(frozen=True)
class JobHistory:
    """The past of a job.

    Attributes:
        next_attempt: Number of the next attempt; 0 for a job that has never run.
        steps_done: Steps that were completed at least once.
    """

    next_attempt: int = 0
    steps_done: int = 0


def read_history(ledger: Path | None, job: str) -> JobHistory:
    """Read the past of a job from the ledger of its run.

    Args:
        ledger: The ledger file; None or a missing file is an empty past.
        job: Id of the job; a ledger may hold several.
    """
    attempts, steps_done = 0, 0
    if ledger is not None:
        for event in read_events(ledger, "attempt.start", "train.step"):
            if event.get("job") != job:
                continue
            if event["kind"] == "attempt.start":
                attempts = max(attempts, event["attempt"] + 1)
            else:
                steps_done = max(steps_done, event["step"] + 1)
    return JobHistory(attempts, steps_done)
