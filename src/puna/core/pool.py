"""Worker processes: an ordered parallel map that dies with its parent and fails loudly.

Processes are spawned (not forked: data engines and torch hold threads and locks) and are killed by
the kernel when the parent dies, so that a ``kill -9`` leaves no orphan that goes on writing.
"""

from __future__ import annotations

import collections
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from puna.core.errors import PunaError

A = TypeVar("A")
B = TypeVar("B")

_PR_SET_PDEATHSIG = 1
_PARENT_POLL_S = 0.5


def usable_cores() -> int:
    """Number of cores that this process may use (affinity respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_workers(n_workers: int) -> int:
    """Turn the configured number of workers into a real one: 0 means one per usable core."""
    return n_workers if n_workers > 0 else usable_cores()


def die_with_parent(parent_pid: int) -> None:
    """Make this process die when its parent dies, even by ``kill -9``.

    On Linux the kernel sends SIGKILL (``prctl(PR_SET_PDEATHSIG)``); elsewhere a thread polls.

    Args:
        parent_pid: Process id of the parent, taken before the child started; if the parent is gone
            already, the process exits at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_poll_parent, args=(parent_pid,), daemon=True).start()
    if os.getppid() != parent_pid:
        os._exit(1)


def _poll_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


def _initialise(parent_pid: int) -> None:
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends the pool


class WorkerPool:
    """A pool of spawned processes with an ordered, bounded map.

    Args:
        n_workers: Number of processes; 1 runs everything in the calling process.
    """

    def __init__(self, n_workers: int) -> None:
        self.n_workers = max(1, n_workers)
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        if self.n_workers > 1:
            self._executor = ProcessPoolExecutor(
                self.n_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_initialise,
                initargs=(os.getpid(),),
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._executor is not None:
            if kind is not None:
                for process in list((self._executor._processes or {}).values()):
                    process.kill()
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Yield ``function(item)`` in the order of the items, whatever the number of workers.

        Args:
            function: A module-level function (it travels by name).
            items: Arguments, each pickled; at most two per worker are in flight.

        Raises:
            PunaError: A worker process was killed from outside.
            Exception: Whatever ``function`` raised, with the worker's traceback attached.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        waiting: collections.deque[tuple[A, Future[Any]]] = collections.deque()
        source = iter(items)
        item: A | None = None
        try:
            while True:
                while len(waiting) < 2 * self.n_workers:
                    try:
                        item = next(source)
                    except StopIteration:
                        break
                    waiting.append((item, self._executor.submit(function, item)))
                if not waiting:
                    return
                item, future = waiting.popleft()
                yield future.result()
        except BrokenProcessPool as error:
            name = getattr(function, "__name__", str(function))
            raise PunaError(
                f"a worker process was killed while {name} worked near {str(item)[:200]}",
                "most often memory ran out: lower `workers`, then run the same command again",
            ) from error
