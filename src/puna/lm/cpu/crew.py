"""The threads of a step: each runs the same compiled function with its own number.

They are Python threads that sleep between steps; the compiled function gives up the interpreter
lock, and inside it they share the work piece by piece (:mod:`puna.lm.cpu.schedule`). A parallel
loop per matrix would wake them a hundred times per token.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

Task = Callable[[int], None]
_LOST_WAKEUP_S = 0.1

_crews: dict[tuple[int, int], Crew] = {}
_crews_lock = threading.Lock()


def crew_of(n_threads: int) -> Crew:
    """Return this process's crew of some size; models share it, for threads never end.

    Threads do not survive a fork: a child process has crews of its own.
    """
    key = (os.getpid(), n_threads)
    with _crews_lock:
        if key not in _crews:
            _crews[key] = Crew(n_threads)
        return _crews[key]


class Crew:
    """Runs a function on several threads at once, the caller's among them.

    Args:
        n_threads: How many run, the caller included.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._round = 0
        self._tasks: list[SimpleQueue[tuple[int, Task]]] = []
        self._finished = [0] * n_threads
        self._wakeups: SimpleQueue[None] = SimpleQueue()
        self._errors: SimpleQueue[BaseException] = SimpleQueue()
        self._lock = threading.Lock()
        for number in range(1, n_threads):
            self._tasks.append(SimpleQueue())
            threading.Thread(
                target=self._work, args=(number,), name=f"puna-decode-{number}", daemon=True
            ).start()

    def run(self, task: Task) -> None:
        """Call ``task(number)`` on every thread, and return when all have returned.

        The task must not wait for a thread that has not begun: an interrupt of the caller (Ctrl-C)
        may come before its own part does, and the others then finish alone.
        """
        with self._lock:
            self._round += 1
            try:
                for tasks in self._tasks:
                    tasks.put((self._round, task))
                task(0)
            except BaseException:
                for tasks in self._tasks:  # those that the interrupted loop above left out
                    tasks.put((self._round, _nothing))
                raise
            finally:
                self._join()
        try:
            raise self._errors.get_nowait()
        except Empty:
            pass

    def _join(self) -> None:
        """Wait for the others, through interrupts: they still use the task's memory."""
        interrupt: KeyboardInterrupt | None = None
        while any(done < self._round for done in self._finished[1:]):
            try:
                # An interrupt may swallow a wake-up; the time limit makes up for it.
                self._wakeups.get(timeout=_LOST_WAKEUP_S)
            except Empty:
                pass
            except KeyboardInterrupt as error:
                interrupt = error
        while not self._wakeups.empty():
            self._wakeups.get()
        if interrupt is not None:
            raise interrupt

    def _work(self, number: int) -> None:
        while True:
            current, task = self._tasks[number - 1].get()
            try:
                if current > self._finished[number]:
                    task(number)
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                self._errors.put(error)
            del task  # or the memory of a model would be kept until the next step
            self._finished[number] = current
            self._wakeups.put(None)


def _nothing(number: int) -> None:
    """Do nothing."""
