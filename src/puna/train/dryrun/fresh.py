"""Calls that each get a process of their own, forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TypeVar

from puna.core.errors import PunaError

A = TypeVar("A")
B = TypeVar("B")


class FreshProcesses:
    """Runs calls side by side, none in a process that another one has used.

    Args:
        n_at_once: Processes at the same time.
        preload: Modules that are imported once, before the first call.
    """

    def __init__(self, n_at_once: int, preload: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._threads = ThreadPoolExecutor(n_at_once)

    def __enter__(self) -> FreshProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, function: Callable[[A], B], argument: A) -> Future[B]:
        """Call a function of a module in a new process.

        The result raises what the function raised, or a :class:`PunaError` when the process was
        killed.
        """
        return self._threads.submit(self._call, function, argument)

    def _call(self, function: Callable[[A], B], argument: A) -> B:
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_serve, args=(sender, function, argument), daemon=True
        )
        process.start()
        sender.close()
        with receiver:
            try:
                error, details, result = receiver.recv()
            except EOFError:
                raise PunaError(
                    f"the process that worked on {function.__name__} was killed",
                    "most often memory ran out: end other programs, then try again",
                ) from None
            finally:
                process.join()
                process.close()
        if error is not None:
            error.add_note(details)
            raise error
        return result


def _serve(sender: Connection, function: Callable[[A], B], argument: A) -> None:
    try:
        answer = None, "", function(argument)
    except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
        answer = error, traceback.format_exc(), None
    with sender:
        sender.send(answer)
