"""The append-only ledger of a run: one JSON line per event, written by every process of the run.

Goodput, reports, the dashboard and the recovery logic all read this one file. Each event carries a
wall clock (``t_wall_s``, seconds since 1970) and a monotonic clock (``t_mono_s``; comparable
between the processes of one boot of one machine).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEDGER_FILE = "events.jsonl"


class Ledger:
    """Appends events to ``events.jsonl``; safe to use from several processes at once.

    A line is one ``write`` on a descriptor opened with ``O_APPEND``, so lines of different
    processes do not mix. A process that dies inside a write leaves a torn line; readers skip it.

    Args:
        path: The ledger file; created when absent. None gives a ledger that keeps nothing on disk.
        **common: Fields added to every event (``stage``, ``rank``).
    """

    def __init__(self, path: Path | None, **common: Any) -> None:
        self.path = path
        self._common = common
        if path is not None and path.exists():
            _close_torn_line(path)

    def bind(self, **common: Any) -> Ledger:
        """Return a ledger on the same file that adds more fields to every event."""
        return Ledger(self.path, **{**self._common, **common})

    def emit(self, kind: str, *, durable: bool = False, **fields: Any) -> dict[str, Any]:
        """Append one event.

        Args:
            kind: Dotted name, ``stage.start`` or ``train.step``.
            durable: fsync before returning (for events that recovery depends on).
            **fields: JSON values; NaN and infinity are written as strings.

        Returns:
            The event as written.
        """
        event = {
            "kind": kind,
            "t_wall_s": time.time(),
            "t_mono_s": time.monotonic(),
            "pid": os.getpid(),
            **self._common,
            **{name: _plain(value) for name, value in fields.items()},
        }
        if self.path is None:
            return event
        line = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(fd, line.encode())
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        return event


def read_events(path: Path, *kinds: str) -> Iterator[dict[str, Any]]:
    """Yield the events of a ledger in file order, skipping torn lines.

    Args:
        path: A ledger file; a missing one has no events.
        *kinds: Only these kinds (all when empty).
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # torn by a process that died while writing
            if isinstance(event, dict) and (not kinds or event.get("kind") in kinds):
                yield event


class LedgerTail:
    """What a ledger gets from now on.

    Args:
        path: A ledger file, or where one may come; None for none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._offset = path.stat().st_size if path is not None and path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the events since the last call."""
        if self._path is None or not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written; read again from here
                self._offset += len(line)
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # torn by a process that died while writing


def _close_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
