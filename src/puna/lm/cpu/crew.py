"""The threads of a step: each runs the same compiled function with its own number.

They are Python threads that sleep between steps; the compiled function gives up the interpreter
lock, and inside it they wait for each other by spinning (:mod:`puna.lm.cpu.step`). A parallel loop
per matrix would wake them a hundred times per token.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class Crew:
    """Runs a function on several threads at once, the caller's among them.

    Args:
        n_threads: How many run, the caller included.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._task: Callable[[int], None] = _nothing
        self._start = [threading.Semaphore(0) for _ in range(n_threads - 1)]
        self._done = threading.Semaphore(0)
        self._errors: list[BaseException] = []
        self._pid = os.getpid()
        self._lock = threading.Lock()
        for number in range(1, n_threads):
            name = f"puna-decode-{number}"
            threading.Thread(target=self._work, args=(number,), name=name, daemon=True).start()

    def run(self, task: Callable[[int], None]) -> None:
        """Call ``task(number)`` on every thread, and return when all have returned.

        Raises:
            ValueError: In a process forked from the one that made this object: threads do not
                survive a fork.
        """
        if os.getpid() != self._pid:
            raise ValueError("a crew of threads does not survive a fork; load the model again")
        with self._lock:
            self._task = task
            for start in self._start:
                start.release()
            try:
                task(0)
            finally:
                for _ in self._start:
                    self._done.acquire()
            if self._errors:
                raise self._errors.pop()

    def _work(self, number: int) -> None:
        while True:
            self._start[number - 1].acquire()
            try:
                self._task(number)
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                self._errors.append(error)
            finally:
                self._done.release()


def _nothing(number: int) -> None:
    """Do nothing."""
