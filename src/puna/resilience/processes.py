"""What the system knows about a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NO_PROCESS = 0
"""Stands for the process of a rank that is known to be dead, on whatever machine."""


def process_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended but was not collected yet does not."""
    if pid == NO_PROCESS:
        return False
    if sys.platform == "linux":
        state = _stat(pid)
        return state is not None and state[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_stopped(pid: int) -> bool:
    """Tell whether a signal has stopped a process; False where this cannot be known."""
    state = _stat(pid) if sys.platform == "linux" else None
    return state is not None and state[0] == "T"  # "t" is a debugger


def parent_of(pid: int) -> int:
    """Return the parent of a running process (Linux).

    Raises:
        ProcessLookupError: It does not run.
    """
    state = _stat(pid)
    if state is None:
        raise ProcessLookupError(f"no process {pid}")
    return int(state[1])


def _stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` from the state on; the name before them may hold anything."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()
