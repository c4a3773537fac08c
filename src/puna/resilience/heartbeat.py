"""Heartbeats and failure notes: small files, one per rank, in the folder of an attempt."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.resilience.hang import PlaceWriter
from puna.resilience.protocols import (
    Failure,
    FailureKind,
    Heartbeat,
    Phase,
    PreflightError,
    RollBackError,
)
from puna.resilience.straggler import WINDOW_STEPS


class HeartbeatWriter:
    """Writes the heartbeat of one rank.

    The step loop itself calls it, not a thread beside it: a rank whose loop hangs falls silent.

    Attributes:
        step: Step of the last heartbeat.
        place: Where the rank is inside the step.

    Args:
        folder: Folder of the attempt; must exist.
        rank: Rank of this process.
        node: Machine of this process.
    """

    def __init__(self, folder: Path, rank: int, node: int = 0) -> None:
        self._path = folder / f"heartbeat-{rank}.json"
        self._aside = folder / f".heartbeat-{rank}.tmp"
        self._folder, self.rank, self._node = folder, rank, node
        self.step = 0
        self._compute_s: deque[float] = deque(maxlen=WINDOW_STEPS)
        self.place = PlaceWriter(folder, rank)

    def beat(self, phase: Phase, step: int) -> None:
        """Tell that this rank is alive and begins ``phase`` of ``step``."""
        self.step = step
        now = Heartbeat(
            self.rank, os.getpid(), step, phase, time.monotonic(), self._node,
            tuple(self._compute_s),
        )  # fmt: skip
        self._aside.write_text(json.dumps(asdict(now)), encoding="utf-8")
        os.replace(self._aside, self._path)  # a reader sees the old or the new one, never half

    def worked(self, compute_s: float) -> None:
        """Remember how long a step has computed; the next heartbeat tells it."""
        self._compute_s.append(compute_s)

    def fail(self, error: BaseException, details: str, *, lost_peer: bool = False) -> None:
        """Write down why this rank ends.

        Args:
            error: The error; a :class:`PunaError` is a user error.
            details: Its traceback.
            lost_peer: It says only that another rank went away.
        """
        user = isinstance(error, PunaError)
        message = f"{type(error).__name__}: {error}"
        kind: FailureKind = "peer" if lost_peer else "crash"
        if isinstance(error, RollBackError):
            kind, message = "roll_back", str(error)
        elif isinstance(error, PreflightError):
            kind = "preflight"
            message = f"before the first step, rank {self.rank} (node {self._node}): {error}"
        note = Failure(
            self.rank,
            self.step,
            "user" if user else kind,
            error.message if user else message,
            error.fix if user else None,
            details,
            time.monotonic(),
            self._node,
        )
        path = self._folder / f"failure-{self.rank}.json"
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(note)), encoding="utf-8")
        os.replace(aside, path)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Read the heartbeats of an attempt, by rank."""
    beats = [Heartbeat(**values) for values in _read(folder, "heartbeat-*.json")]
    return sorted(beats, key=lambda beat: beat.rank)


def read_failures(folder: Path) -> list[Failure]:
    """Read the failure notes of an attempt, causes before consequences, then by time."""
    notes = [Failure(**values) for values in _read(folder, "failure-*.json")]
    order = ("user", "preflight", "crash", "roll_back", "peer")
    return sorted(notes, key=lambda note: (order.index(note.kind), note.t_mono_s))


def _read(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for path in folder.glob(pattern):
        yield json.loads(path.read_text(encoding="utf-8"))
