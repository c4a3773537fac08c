"""Progress of long work: a live bar with rate and ETA on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from puna.core.units import format_count, format_duration, format_rate

LOG_EVERY_S = 10.0

console = Console(stderr=True, highlight=False)
"""Messages for people go to standard error; results go to standard output."""


class Bar(Protocol):
    """What a stage calls while it works."""

    def advance(self, n: float = 1, note: str = "") -> None:
        """Add ``n`` units of work; ``note`` replaces the text at the end of the line."""
        ...

    def set_total(self, total: float) -> None:
        """Set the total once it is known."""
        ...


def say(*parts: str | tuple[str, str]) -> None:
    """Print one line for the person who watches.

    Args:
        parts: Text as it is (an error may hold brackets), or text with a style: ``("done",
            "green")``.
    """
    console.print(Text.assemble(*parts), soft_wrap=True)


@contextlib.contextmanager
def progress(
    what: str, *, total: float | None = None, unit: str = "items", initial: float = 0
) -> Iterator[Bar]:
    """Show the progress of ``what`` while the block runs.

    Args:
        what: Name shown at the start of the line, usually the stage.
        total: Units of work in all; None when it is not known yet.
        unit: Name of the unit, for the rate.
        initial: Units that an earlier, interrupted attempt has done already.
    """
    live = console.is_terminal and os.environ.get("PUNA_PROGRESS", "auto") != "plain"
    if not live:
        bar = _LogBar(what, total, unit, initial)
        yield bar
        bar.finish()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as display:
        task = display.add_task(what, total=total, completed=int(initial), rate="", note="")
        yield _LiveBar(display, task, unit)


class _LiveBar:
    def __init__(self, display: Progress, task: int, unit: str) -> None:
        self._display, self._task, self._unit = display, task, unit
        self._start_s, self._done = time.monotonic(), 0.0

    def advance(self, n: float = 1, note: str = "") -> None:
        self._done += n
        elapsed_s = max(time.monotonic() - self._start_s, 1e-6)
        fields = {"rate": format_rate(self._done / elapsed_s, self._unit)}
        if note:
            fields["note"] = note
        self._display.update(self._task, advance=n, **fields)  # type: ignore[arg-type]

    def set_total(self, total: float) -> None:
        self._display.update(self._task, total=total)  # type: ignore[arg-type]


class _LogBar:
    def __init__(self, what: str, total: float | None, unit: str, initial: float) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._initial, self._done, self._note = initial, initial, ""
        self._start_s = self._last_s = time.monotonic()

    def advance(self, n: float = 1, note: str = "") -> None:
        self._done += n
        self._note = note or self._note
        now_s = time.monotonic()
        if now_s - self._last_s >= LOG_EVERY_S:
            self._last_s = now_s
            self._print(now_s)

    def set_total(self, total: float) -> None:
        self._total = total

    def finish(self) -> None:
        self._print(time.monotonic(), final=True)

    def _print(self, now_s: float, *, final: bool = False) -> None:
        elapsed_s = max(now_s - self._start_s, 1e-6)
        per_s = (self._done - self._initial) / elapsed_s
        of = f"/{format_count(self._total)}" if self._total else ""
        parts = [f"{format_count(self._done)}{of} {self._unit}", format_rate(per_s, self._unit)]
        if final:
            parts.append(f"done in {format_duration(elapsed_s)}")
        elif self._total and per_s > 0:
            parts.append(f"ETA {format_duration(max(self._total - self._done, 0) / per_s)}")
        if self._note:
            parts.append(self._note)
        print(f"{self._what}: " + ", ".join(parts), file=sys.stderr, flush=True)  # noqa: T201
