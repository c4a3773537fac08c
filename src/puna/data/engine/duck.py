"""The embedded engine: kernels in worker processes, relational steps as Ibis on DuckDB."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from puna.core.fsio import remove_tree
from puna.core.pool import resolve_workers
from puna.data.engine.base import GroupKernel, Kernel, Manifest
from puna.data.engine.local import map_shards
from puna.data.engine.shards import list_shards, shard_writer, write_shard
from puna.data.schema import shard_name

if TYPE_CHECKING:
    import ibis.expr.types as ir

STREAM_ROWS = 65536
GROUP_ROWS = 262_144
"""Rows of complete groups that are handed to a group kernel at once (more for one large group)."""


class DuckDBEngine:
    """Runs everything on this machine; DuckDB is opened when the first relation is read.

    Args:
        scratch: Folder for spill files; removed on exit.
        n_workers: Worker processes and DuckDB threads; 0 means one per usable core.
        memory_mib: DuckDB's memory limit; beyond it sorts, joins and windows spill to ``scratch``.
    """

    def __init__(self, scratch: Path, *, n_workers: int = 1, memory_mib: int = 2048) -> None:
        self._scratch, self._memory_mib = scratch, memory_mib
        self._n_workers = resolve_workers(n_workers)
        self._backend: Any = None

    def __enter__(self) -> DuckDBEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._backend is not None:
            self._backend.disconnect()
            self._backend = None
        remove_tree(self._scratch)

    def annotate(
        self, step: str, documents: Path, out: Path, kernel: Kernel, *, carry: Sequence[str] = ()
    ) -> Manifest:
        """See :meth:`puna.data.engine.base.Engine.annotate`."""
        return map_shards(step, documents, out, kernel, n_workers=self._n_workers, carry=carry)

    def judge(
        self, step: str, documents: Path, out: Path, kernel: Kernel, *, side: Path | None = None
    ) -> Manifest:
        """See :meth:`puna.data.engine.base.Engine.judge`."""
        return map_shards(step, documents, out, kernel, n_workers=self._n_workers, side=side)

    def read(self, folder: Path) -> ir.Table:
        """See :meth:`puna.data.engine.base.Engine.read`."""
        paths = [str(shard.path) for shard in list_shards(folder)]
        with _quiet():
            return self._ibis.read_parquet(paths)

    def put(self, table: pa.Table, folder: Path) -> ir.Table:
        """See :meth:`puna.data.engine.base.Engine.put`."""
        remove_tree(folder)
        folder.mkdir(parents=True)
        write_shard(folder / shard_name(0), table)
        return self.read(folder)

    def count(self, relation: ir.Table) -> int:
        """See :meth:`puna.data.engine.base.Engine.count`."""
        with _quiet():
            return int(self._relation(relation.count().as_table()).to_arrow_table()[0][0].as_py())

    def collect(self, relation: ir.Table, order_by: Sequence[str]) -> pa.Table:
        """See :meth:`puna.data.engine.base.Engine.collect`."""
        with _quiet():
            table = self._relation(relation.order_by(list(order_by))).to_arrow_table()
        return table.cast(relation.schema().to_pyarrow())

    def write(
        self, relation: ir.Table, folder: Path, *, order_by: Sequence[str], n_shards: int = 1
    ) -> None:
        """See :meth:`puna.data.engine.base.Engine.write`."""
        remove_tree(folder)
        folder.mkdir(parents=True)
        with contextlib.closing(self._stream(relation, order_by)) as batches:
            schema = next(batches).schema  # the first batch is empty and carries the schema
            current = _ShardSequence(folder, schema, n_shards)
            with current:
                for batch in batches:
                    current.write(batch)

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
        with shard_writer(folder / shard_name(0), kernel.adds()) as writer:
            for table in _whole_groups(self._stream(relation, [by, *order_by]), by):
                for batch in kernel(table).to_batches():
                    writer.write(batch)
        return self.read(folder)

    def _stream(
        self, relation: ir.Table, order_by: Sequence[str]
    ) -> Generator[pa.RecordBatch, None, None]:
        """Yield an empty batch with the schema, then the rows in order, a batch at a time."""
        with _quiet():
            reader = self._relation(relation.order_by(list(order_by))).to_arrow_reader(STREAM_ROWS)
        schema = relation.schema().to_pyarrow()  # DuckDB itself sums int64 to 128 bits
        yield pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)
        for batch in reader:
            yield batch.cast(schema)

    def _relation(self, expression: ir.Table) -> Any:
        return self._ibis.con.sql(self._ibis.compile(expression))

    @property
    def _ibis(self) -> Any:
        if self._backend is None:
            import ibis

            self._scratch.mkdir(parents=True, exist_ok=True)
            with _quiet():
                self._backend = ibis.duckdb.connect(
                    temp_directory=str(self._scratch),
                    memory_limit=f"{self._memory_mib}MiB",
                    threads=self._n_workers,
                    preserve_insertion_order=False,
                )
        return self._backend


class _ShardSequence:
    """Cuts a stream that is ordered by its column ``shard`` into one file per shard."""

    def __init__(self, folder: Path, schema: pa.Schema, n_shards: int) -> None:
        self._folder, self._n_shards = folder, n_shards
        self._cut = n_shards > 1
        fields = [field for field in schema if field.name != "shard" or not self._cut]
        self._schema = pa.schema(fields)
        self._index = -1
        self._stack = contextlib.ExitStack()
        self._writer: Any = None

    def __enter__(self) -> _ShardSequence:
        return self

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is None:
            self._advance(self._n_shards - 1)
        self._stack.__exit__(*exc)

    def _advance(self, index: int) -> None:
        """Finish shards up to ``index``, also those without rows, and open it."""
        while self._index < index:
            self._stack.close()
            self._index += 1
            path = self._folder / shard_name(self._index)
            self._writer = self._stack.enter_context(shard_writer(path, self._schema))

    def write(self, batch: pa.RecordBatch) -> None:
        if not self._cut:
            self._advance(0)
            self._writer.write(batch)
            return
        shards = batch.column("shard").to_numpy(zero_copy_only=False)
        rows = batch.select(self._schema.names)
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(shards)], strict=True):
            self._advance(int(shards[start]))
            self._writer.write(rows.slice(start, end - start))


def _whole_groups(batches: Iterator[pa.RecordBatch], by: str) -> Iterator[pa.Table]:
    """Regroup an ordered stream so that no group is torn between two tables."""
    pending: list[pa.RecordBatch] = []
    n_rows, enough = 0, GROUP_ROWS
    for batch in batches:
        pending.append(batch)
        n_rows += batch.num_rows
        if n_rows < enough:
            continue
        table = pa.Table.from_batches(pending).combine_chunks()
        key = table[by]
        cut = key.index(key[-1]).as_py()
        if cut:
            yield table.slice(0, cut)
        pending, n_rows = table.slice(cut).to_batches(), table.num_rows - cut
        enough = max(GROUP_ROWS, 2 * n_rows)  # a group that large is not looked at every time
    if n_rows:
        yield pa.Table.from_batches(pending).combine_chunks()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Ibis calling a method that DuckDB 2 renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fetch_arrow_table", category=DeprecationWarning)
        yield
