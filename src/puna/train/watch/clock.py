"""Where the time of a step goes: a clock of parts that stand inside one another.

Entering an inner part stops the outer one, so every moment counts to one part and the parts add up
to no more than the step. On a CPU the host's clock is read. On a GPU, which works behind the host,
events are put into its stream and read when a ledger event is due: no step waits for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch

Part = Literal["data", "forward", "backward", "optimizer", "communication", "checkpoint", "eval"]
STEP_PARTS: tuple[Part, ...] = ("data", "forward", "backward", "optimizer", "communication")
"""Parts of a step; what is left of it is the loop itself."""
COMPUTE_PARTS: tuple[Part, ...] = ("forward", "backward", "optimizer")
"""Parts in which a rank works by itself, as far as exchanges are told apart from them."""
BESIDE_PARTS: tuple[Part, ...] = ("checkpoint", "eval")
"""What a training waits for between two steps."""


class StepClock:
    """Adds up the time of each part.

    Args:
        device: Where the work is done.

    Attributes:
        on_enter: Called with the name of each part that begins.
        on_leave: Called at the end of a part with the one that it stands in; empty for none.
        mark: Opens a mark of a profiler for a part; None without one.
    """

    def __init__(self, device: torch.device) -> None:
        self.mark: Callable[[str], Any] | None = None
        self.on_enter: Callable[[str], None] | None = None
        self.on_leave: Callable[[str], None] | None = None
        self._marks: list[Any] = []
        self._is_gpu = device.type == "cuda"
        self._now: Callable[[], Any] = self._event if self._is_gpu else time.perf_counter
        self._open: list[Part] = []
        self._since: Any = None
        self._spans: list[tuple[Part, Any, Any]] = []
        self._n_counted, self._compute_s = 0, 0.0

    def part(self, name: Part) -> _Inside:
        """Return a context whose time counts to a part."""
        return _Inside(self, name)

    def timed(self, name: Part, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts to a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def take_compute(self) -> float:
        """Return the seconds of computing since the last call; no part may be open.

        What a GPU has not finished yet counts at a later call.
        """
        self._count_compute()
        seconds, self._compute_s = self._compute_s, 0.0
        return seconds

    def _count_compute(self) -> None:
        for name, begin, end in self._spans[self._n_counted :]:
            if self._is_gpu and not end.query():
                return
            if name in COMPUTE_PARTS:
                self._compute_s += self._seconds(begin, end)
            self._n_counted += 1

    def _seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._is_gpu else end - begin

    def take(self) -> dict[Part, float]:
        """Return the seconds of each part since the last call, and begin anew."""
        if self._open:
            raise ValueError(f"the part {self._open[-1]} is not at its end")
        if self._is_gpu and self._spans:
            self._spans[-1][2].synchronize()
        self._count_compute()
        seconds: dict[Part, float] = dict.fromkeys((*STEP_PARTS, *BESIDE_PARTS), 0.0)
        for name, begin, end in self._spans:
            seconds[name] += self._seconds(begin, end)
        self._spans.clear()
        self._n_counted = 0
        return seconds

    def _enter(self, name: Part) -> None:
        now = self._now()
        if self._open and self._open[-1] in BESIDE_PARTS:
            name = self._open[-1]  # no part of a step
        if self._open:
            self._spans.append((self._open[-1], self._since, now))
        self._open.append(name)
        if self.on_enter is not None:
            self.on_enter(name)
        if self.mark is not None:
            self._marks.append(self.mark(name))
        self._since = now

    def _leave(self) -> None:
        now = self._now()
        self._spans.append((self._open.pop(), self._since, now))
        if self.on_leave is not None:
            self.on_leave(self._open[-1] if self._open else "")
        if self._marks:
            self._marks.pop().__exit__(None, None, None)
        self._since = now

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Inside:
    """One stay in a part; a class of its own because a generator costs three times as much."""

    __slots__ = ("_clock", "_name")

    def __init__(self, clock: StepClock, name: Part) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock._enter(self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clock._leave()
