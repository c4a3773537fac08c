"""A function over items on the executors of a Spark cluster, one task per item.

The function reads and writes files itself, by the same code as on one machine; Spark places it,
retries it when an executor dies, and brings its outcome back. Nothing is lost by a partition that
ends early: every item must have exactly one outcome, or the map raises.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path, remove_tree

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

A = TypeVar("A")
B = TypeVar("B")

_OUTCOMES = pa.schema([pa.field("index", pa.int64()), pa.field("outcome", pa.binary())])
_POLL_S = 0.2
_numbers = itertools.count()


def map_on_spark(
    session: SparkSession, function: Callable[[A], B], items: Sequence[A], folder: Path
) -> Iterator[B]:
    """Yield ``function(item)`` in the order of the items, each as soon as it is there.

    Args:
        session: Where.
        function: A module-level function of a package that the executors have.
        items: Arguments, each pickled.
        folder: New folder that driver and executors see; outcomes come in through it while the job
            runs.

    Raises:
        PunaError: What ``function`` raised as such (the remaining tasks are cancelled), or Spark
            gave up because executors died.
        Exception: ``function`` failed otherwise; the message holds its traceback.
    """
    if not items:
        return
    folder.mkdir(parents=True)
    pickled = [pickle.dumps(item) for item in items]
    outcomes = partial(at_home, partial(_outcomes, function, pickled, folder), Path.cwd())
    rows = session.range(0, len(items), 1, len(items))
    frame = rows.mapInArrow(outcomes, "index bigint, outcome binary")
    job = SparkJob(session, frame)
    try:
        for index in range(len(items)):
            yield _value(job, folder, index)
        if len(job.rows()) != len(items):
            raise RuntimeError(f"Spark returned {len(job.rows())} outcomes for {len(items)} tasks")
    finally:
        job.cancel()
        remove_tree(folder)


def at_home(
    function: Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]],
    home: Path,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Run on an executor, in the driver's folder: recipes may name files by relative paths."""
    with contextlib.chdir(home) if home.is_dir() else contextlib.nullcontext():
        yield from function(batches)


def _value(job: SparkJob, folder: Path, index: int) -> Any:
    """Wait for an outcome: its file, or, once the job is over, its row."""
    path = folder / str(index)
    while not path.is_file() and not job.wait(_POLL_S):
        pass
    outcome = path.read_bytes() if path.is_file() else dict(job.rows()).get(index)
    if outcome is None:
        raise RuntimeError(f"Spark ended without an outcome of task {index}")
    is_good, value = pickle.loads(outcome)  # noqa: S301 (our executor wrote it, just now)
    if not is_good:
        raise value
    return value


def _outcomes(
    function: Callable[[Any], Any],
    pickled: Sequence[bytes],
    folder: Path,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Run on an executor: the items that a partition's rows name."""
    for batch in batches:
        for index in batch.column(0).to_pylist():
            try:
                item = pickle.loads(pickled[index])  # noqa: S301 (came with the task)
                outcome = pickle.dumps((True, function(item)))
            except PunaError as error:  # bad input is no reason to try again
                outcome = pickle.dumps((False, error))
            with atomic_path(folder / str(index)) as temporary:
                temporary.write_bytes(outcome)
            columns = [pa.array([index], pa.int64()), pa.array([outcome], pa.binary())]
            yield pa.RecordBatch.from_arrays(columns, schema=_OUTCOMES)


class SparkJob:
    """The rows of a frame, collected by a thread that can be waited for and cancelled.

    Args:
        session: Where.
        frame: What to collect.
    """

    def __init__(self, session: SparkSession, frame: DataFrame) -> None:
        from pyspark import InheritableThread

        self._context = session.sparkContext
        self._group = f"puna-{next(_numbers)}"
        self._frame = frame
        self._rows: list[Any] = []
        self._error: Exception | None = None
        self._over = threading.Event()
        self._thread = InheritableThread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._context.setJobGroup(self._group, "puna", interruptOnCancel=True)
            self._rows = self._frame.collect()
        except Exception as error:  # noqa: BLE001 (raised where the rows are wanted)
            self._error = error
        finally:
            self._over.set()

    def wait(self, timeout_s: float) -> bool:
        """Tell whether the job is over, waiting a while for it."""
        return self._over.wait(timeout_s)

    def rows(self) -> list[Any]:
        """Wait for the job and return its rows.

        Raises:
            PunaError: Executors died too often.
            Exception: Whatever else stopped the job.
        """
        self._over.wait()
        if self._error is not None:
            raise explained(self._error)
        return self._rows

    def cancel(self) -> None:
        """Stop the job if it runs, and wait until it has stopped."""
        if not self._over.is_set():
            self._context.cancelJobGroup(self._group)
        self._thread.join()


def explained(error: Exception) -> Exception:
    """Turn an error of the cluster, rather than of a program, into one that says what to do."""
    text = str(error)
    if "ExecutorLostFailure" in text or "Python worker exited unexpectedly" in text:
        return PunaError(
            f"Spark gave up after an executor or its Python worker died: {text.splitlines()[0]}",
            "most often memory ran out: see the executors' logs, lower `workers` (tasks at a time) "
            "or raise their memory, then run the same command again",
        )
    return error
