"""What a hung job is asked before it is ended: where each rank is, and which one is missing.

Each rank keeps a page of a file in its memory: the part of the step that it is in, and the number
of collectives it has entered. Writing it is a store into memory, so it is kept up to date within a
step, and the supervisor reads it of a process that answers nothing any more. Stacks come from
``faulthandler``, whose handler runs in C: also a rank inside a collective or an endless loop writes
its own.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import shutil
import signal
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from puna.resilience.processes import is_stopped
from puna.resilience.protocols import COLLECTIVE, Heartbeat, Place

DATA = "data"
"""Part in which a rank waits for its batch."""
_RECORD = struct.Struct("<Q24s")
_ENOUGH_STEPS = 6
"""Steps from which a limit is derived."""
_STACK_WAIT_S = 0.5
_QUIET_S = 0.1
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>.+)$')


class PlaceWriter:
    """Keeps the place of one rank.

    Args:
        folder: Folder of the attempt; must exist.
        rank: Rank of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = _place_file(folder, rank)
        path.write_bytes(bytes(_RECORD.size))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _RECORD.size)
        self._n_collectives = 0

    def enter(self, part: str) -> None:
        """Tell that the rank is in a part of its step now; empty for none."""
        self._n_collectives += part == COLLECTIVE
        _RECORD.pack_into(self._page, 0, self._n_collectives, part.encode())

    def back_in(self, part: str) -> None:
        """Tell that an inner part has ended and the rank is in the outer one again."""
        _RECORD.pack_into(self._page, 0, self._n_collectives, part.encode())


def read_places(folder: Path, beats: Sequence[Heartbeat]) -> list[Place]:
    """Read where the ranks of an attempt are; those of other machines are left out.

    A file in the memory of another machine is not up to date here.
    """
    places = []
    for beat in beats:
        path = _place_file(folder, beat.rank)
        if beat.node != 0 or not path.exists():
            continue
        number, part = _RECORD.unpack(path.read_bytes())
        places.append(
            Place(beat.rank, beat.step, part.rstrip(b"\0").decode(), number, is_stopped(beat.pid))
        )
    return places


@dataclass(frozen=True)
class Missing:
    """Which ranks the others wait for.

    Attributes:
        ranks: Never empty.
        why: In words.
    """

    ranks: tuple[int, ...]
    why: str


def find_missing(places: Sequence[Place]) -> Missing | None:
    """Name the ranks that the others wait for; None when the places do not tell.

    Args:
        places: Of all ranks of the job.
    """
    stopped = [place for place in places if place.is_stopped]
    if stopped:
        return _missing(stopped, "; ".join(map(str, stopped)))
    waiting = [place for place in places if place.part == COLLECTIVE]
    others = [place for place in places if place.part != COLLECTIVE]
    if waiting and others:
        behind = min((place.step, place.n_collectives) for place in others)
        late = [place for place in others if (place.step, place.n_collectives) == behind]
        return _missing(
            late, f"{'; '.join(map(str, late))}, and {'; '.join(map(str, waiting))}"
        )  # fmt: skip
    if not waiting:
        return _missing(list(places), str(places[0])) if len(places) == 1 else None
    behind = min((place.step, place.n_collectives) for place in waiting)
    late = [place for place in waiting if (place.step, place.n_collectives) == behind]
    if len(late) == len(waiting):
        return None
    return _missing(late, f"all ranks wait, and {'; '.join(map(str, late))}, which is the earliest")


def _missing(places: list[Place], why: str) -> Missing:
    return Missing(tuple(place.rank for place in places), why)


@dataclass
class StepTimes:
    """How long steps take, as far as is known of an attempt.

    Attributes:
        recent_s: Without the first, which warms up.
        n_recent: Steps of all ranks that they are taken from.
        longest_s: With the first.
    """

    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    longest_s: float = 0.0

    n_recent: int = 0

    def add(self, seconds: float, n_steps: int = 1) -> None:
        """Take the mean time of steps that a rank has done between two looks."""
        if self.longest_s > 0.0:
            self.recent_s.append(seconds)
            self.n_recent += n_steps
        self.longest_s = max(self.longest_s, seconds)

    def limit_s(self, floor_s: float, factor: float) -> float | None:
        """Longest silence that is still normal; None while too little is known."""
        if self.n_recent < _ENOUGH_STEPS:
            return None
        return max(floor_s, factor * max(self.recent_s))


def write_stacks_on_signal(folder: Path, rank: int) -> None:
    """Make this process write the stacks of its threads when :func:`collect_stacks` asks.

    Call it before the first heartbeat: without it the signal ends the process.
    """
    file = stack_file(folder, rank).open("w", encoding="utf-8")
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def stack_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return folder / f"stack-{rank}.txt"


def collect_stacks(folder: Path, beats: Sequence[Heartbeat], kept: Path) -> dict[int, Path]:
    """Ask the ranks of this machine for their stacks; they must be ended afterwards.

    A stopped process is continued: it handles the signal before anything else.

    Args:
        folder: Of the attempt.
        beats: Heartbeats of its ranks.
        kept: Folder that the stacks are copied to; made when there are any.

    Returns:
        Copies by rank, of those that answered within half a second.
    """
    asked = []
    for beat in beats:
        path = stack_file(folder, beat.rank)
        if beat.node != 0 or beat.phase == "done" or not path.exists():
            continue
        try:
            os.kill(beat.pid, signal.SIGUSR2)
            os.kill(beat.pid, signal.SIGCONT)
        except ProcessLookupError:  # it ended meanwhile
            continue
        asked.append((beat.rank, path))
    deadline_s = time.monotonic() + _STACK_WAIT_S
    while time.monotonic() < deadline_s and any(not path.stat().st_size for _, path in asked):
        time.sleep(0.01)
    if asked:
        time.sleep(_QUIET_S)  # the last lines of the last one
    copies = {}
    for rank, path in asked:
        if path.stat().st_size:
            kept.mkdir(parents=True, exist_ok=True)
            copies[rank] = Path(shutil.copyfile(path, kept / path.name))
    return copies


def innermost(file: Path) -> str:
    """Return the innermost Python frame of the main thread, the last one that is written."""
    text = file.read_text(encoding="utf-8", errors="replace")
    main = text.rpartition("(most recent call first):")[2]
    for line in main.splitlines():
        match = _FRAME.match(line)
        if match:
            return f"{Path(match['file']).name}:{match['line']} in {match['name']}"
    return "unknown"


def _place_file(folder: Path, rank: int) -> Path:
    return folder / f"place-{rank}.bin"
