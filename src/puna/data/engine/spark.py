"""The engine on a cluster: kernels as Spark tasks over shards, relational steps as Ibis on Spark.

Needs a folder that driver and executors share: executors read and write Parquet by our own code
(the same as on one machine), so that the files, their order and their bytes are the same, and the
conservation of rows is checked from what was written, never taken from Spark. Relations are handed
to the executors' Python by ``mapInArrow`` in a wrapper that counts what goes in and comes out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from puna.core.fsio import remove_tree
from puna.data.engine.base import ConservationError, GroupKernel, Kernel, Manifest, Mapper
from puna.data.engine.local import map_shards
from puna.data.engine.ordered import whole_groups, write_cut, write_empty
from puna.data.engine.shards import list_shards, read_batches, shard_writer, write_shard
from puna.data.engine.shardwork import clean_leftovers
from puna.data.engine.spark_map import SparkJob, at_home, map_on_spark
from puna.data.schema import shard_name

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from pyspark.sql import DataFrame

A = TypeVar("A")
B = TypeVar("B")

_COPY_ROWS = 65536


class SparkEngine:
    """Runs everything on a Spark cluster; the session starts with the first work.

    Args:
        master: `spark://host:port`, `local[n]`, `yarn` or `k8s://...`.
        scratch: Folder for what driver and executors exchange; removed on exit.
        n_workers: Cores to use at most; 0 means all that the cluster gives.
        memory_mib: Memory of each executor.
        settings: Further Spark settings.
    """

    def __init__(
        self,
        master: str,
        scratch: Path,
        *,
        n_workers: int = 0,
        memory_mib: int = 2048,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._master, self._scratch = master, scratch.resolve()
        self._n_workers, self._memory_mib = n_workers, memory_mib
        self._settings = dict(settings or {})
        self._backend: Any = None
        self._started: Any = None
        self._numbers = itertools.count()

    def __enter__(self) -> SparkEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._started is not None:
            self._started.stop()
            self._started = self._backend = None
        remove_tree(self._scratch)

    @property
    def map(self) -> Mapper:
        """See :attr:`puna.data.engine.base.Engine.map`."""
        return self._map

    def _map(
        self, function: Callable[[A], B], items: Sequence[A], *, useful_workers: int | None = None
    ) -> Iterator[B]:
        return map_on_spark(self._session, function, items, self._new_folder("map"))

    def annotate(
        self, step: str, documents: Path, out: Path, kernel: Kernel, *, carry: Sequence[str] = ()
    ) -> Manifest:
        """See :meth:`puna.data.engine.base.Engine.annotate`."""
        return map_shards(step, documents.resolve(), out.resolve(), kernel, self._map, carry=carry)

    def judge(
        self, step: str, documents: Path, out: Path, kernel: Kernel, *, side: Path | None = None
    ) -> Manifest:
        """See :meth:`puna.data.engine.base.Engine.judge`."""
        beside = None if side is None else side.resolve()
        return map_shards(step, documents.resolve(), out.resolve(), kernel, self._map, side=beside)

    def read(self, folder: Path) -> ir.Table:
        """See :meth:`puna.data.engine.base.Engine.read`."""
        shards = list_shards(folder)
        paths = [f"file:{_literal(str(shard.path.resolve()))}" for shard in shards]
        name, backend = f"puna_{next(self._numbers)}", self._ibis
        frame = self._session.read.parquet(*paths)
        n_rows, n_seen = sum(shard.n_rows for shard in shards), frame.count()
        if n_seen != n_rows:
            raise ConservationError(
                "read", str(folder), f"the files hold {n_rows} rows, Spark sees {n_seen}"
            )
        frame.createOrReplaceTempView(name)
        return backend.table(name)

    def put(self, table: pa.Table, folder: Path) -> ir.Table:
        """See :meth:`puna.data.engine.base.Engine.put`."""
        remove_tree(folder)
        folder.mkdir(parents=True)
        write_shard(folder / shard_name(0), table)
        return self.read(folder)

    def count(self, relation: ir.Table) -> int:
        """See :meth:`puna.data.engine.base.Engine.count`."""
        return int(self._frame(relation).count())

    def collect(self, relation: ir.Table, order_by: Sequence[str]) -> pa.Table:
        """See :meth:`puna.data.engine.base.Engine.collect`.

        The rows come through files, not through the memory of the driver's JVM.
        """
        schema, parts = relation.schema().to_pyarrow(), self._new_folder("collect")
        batches = list(self._ordered(relation, order_by, schema, parts))
        remove_tree(parts)
        return pa.Table.from_batches(batches, schema)

    def write(
        self, relation: ir.Table, folder: Path, *, order_by: Sequence[str], n_shards: int = 1
    ) -> None:
        """See :meth:`puna.data.engine.base.Engine.write`."""
        remove_tree(folder)
        folder.mkdir(parents=True)
        schema = relation.schema().to_pyarrow()
        if n_shards > 1:
            frame = self._frame(relation).repartition(n_shards, "shard")
            frame = frame.sortWithinPartitions(*_ascending(order_by))
            written = self._run(frame, partial(_write_cut, folder.resolve(), schema))
            clean_leftovers([folder])  # of executors that died
            write_empty(
                folder, schema, sorted({*range(n_shards)} - {index for index, _ in written})
            )
            return
        parts = self._new_folder("write")
        with shard_writer(folder / shard_name(0), schema) as writer:
            for batch in self._ordered(relation, order_by, schema, parts):
                writer.write(batch)
        remove_tree(parts)

    def groups(
        self,
        relation: ir.Table,
        folder: Path,
        kernel: GroupKernel,
        *,
        by: str,
        order_by: Sequence[str],
    ) -> ir.Table:
        """See :meth:`puna.data.engine.base.Engine.groups`."""
        remove_tree(folder)
        folder.mkdir(parents=True)
        parts = self._new_folder("groups")
        frame = self._frame(relation).repartition(by)
        frame = frame.sortWithinPartitions(*_ascending([by, *order_by]))
        schema = relation.schema().to_pyarrow()
        written = self._run(frame, partial(_apply, parts, schema, kernel, by))
        indices = sorted(index for index, _ in written)
        for number, index in enumerate(indices):
            (parts / shard_name(index)).replace(folder / shard_name(number))
        if not indices:
            write_empty(folder, kernel.adds(), [0])
        remove_tree(parts)
        return self.read(folder)

    def _ordered(
        self, relation: ir.Table, order_by: Sequence[str], schema: pa.Schema, parts: Path
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows in order: sorted by the executors, one file per range of the order."""
        frame = self._frame(relation).sort(*_ascending(order_by))
        written = self._run(frame, partial(_write_part, parts, schema))
        for index, n_rows in sorted(written):
            n_read = 0
            for batch in read_batches(parts / shard_name(index), None, _COPY_ROWS):
                n_read += batch.num_rows
                yield batch
            if n_read != n_rows:
                raise RuntimeError(f"{parts}: part {index} holds {n_read} of {n_rows} rows")

    def _run(self, frame: DataFrame, function: Any) -> list[tuple[int, int]]:
        """Hand a frame to a function on the executors that writes files.

        Returns:
            Number and rows of each file.
        """
        there = partial(at_home, function, Path.cwd())
        job = SparkJob(self._session, frame.mapInArrow(there, "index bigint, n_rows bigint"))
        try:
            return [(row[0], row[1]) for row in job.rows()]
        finally:
            job.cancel()

    def _frame(self, relation: ir.Table) -> DataFrame:
        return self._session.sql(self._ibis.compile(relation))

    def _new_folder(self, what: str) -> Path:
        folder = self._scratch / f"{what}-{next(self._numbers)}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def _session(self) -> Any:
        if self._started is None:
            from puna.data.engine.spark_session import connect

            self._scratch.mkdir(parents=True, exist_ok=True)
            self._started = connect(
                self._master, self._scratch, n_workers=self._n_workers,
                memory_mib=self._memory_mib, settings=self._settings,
            )  # fmt: skip
        return self._started

    @property
    def _ibis(self) -> Any:
        if self._backend is None:
            import ibis

            self._backend = ibis.pyspark.connect(self._session)
        return self._backend


def _literal(path: str) -> str:
    """Escape what Spark would take for a pattern of paths."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", path)


def _ascending(order_by: Sequence[str]) -> list[Any]:
    from pyspark.sql import functions

    return [functions.col(f"`{name}`").asc_nulls_last() for name in order_by]


def _partition() -> int:
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    return context.partitionId()


def _report(rows: Iterable[tuple[int, int]]) -> pa.RecordBatch:
    pairs = list(rows)
    columns = [pa.array([pair[i] for pair in pairs], pa.int64()) for i in (0, 1)]
    return pa.RecordBatch.from_arrays(columns, ["index", "n_rows"])


def _write_part(
    folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Write a partition as one file."""
    folder.mkdir(parents=True, exist_ok=True)
    index, n_rows = _partition(), 0
    with shard_writer(folder / shard_name(index), schema) as writer:
        for batch in batches:
            writer.write(batch.cast(schema))
            n_rows += batch.num_rows
    yield _report([(index, n_rows)])


def _write_cut(
    folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Write the shards of a partition."""
    written = write_cut(folder, schema, (batch.cast(schema) for batch in batches))
    yield _report((index, 0) for index in written)


def _apply(
    folder: Path,
    schema: pa.Schema,
    kernel: GroupKernel,
    by: str,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Write a group kernel's results for the groups of a partition."""
    folder.mkdir(parents=True, exist_ok=True)
    index, n_rows = _partition(), 0
    tables = whole_groups((batch.cast(schema) for batch in batches), by)
    with shard_writer(folder / shard_name(index), kernel.adds()) as writer:
        for table in tables:
            for batch in kernel(table).to_batches():
                writer.write(batch)
                n_rows += batch.num_rows
    yield _report([(index, n_rows)])
