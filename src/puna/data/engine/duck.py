"""The embedded engine: kernels in worker processes, relational steps as Ibis on DuckDB."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from puna.core.fsio import remove_tree
from puna.core.pool import resolve_workers
from puna.data.engine.base import GroupKernel, Kernel, Manifest, Mapper
from puna.data.engine.local import LocalMap, map_shards
from puna.data.engine.ordered import whole_groups, write_cut, write_empty
from puna.data.engine.shards import list_shards, shard_writer, write_shard
from puna.data.schema import shard_name

if TYPE_CHECKING:
    import ibis.expr.types as ir

STREAM_ROWS = 65536


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
        self._workers = LocalMap(self._n_workers)
        self._backend: Any = None

    def __enter__(self) -> DuckDBEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._workers.__exit__(*exc)
        if self._backend is not None:
            self._backend.disconnect()
            self._backend = None
        remove_tree(self._scratch)

    @property
    def map(self) -> Mapper:
        """See :attr:`puna.data.engine.base.Engine.map`."""
        return self._workers

    def annotate(
        self, step: str, documents: Path, out: Path, kernel: Kernel, *, carry: Sequence[str] = ()
    ) -> Manifest:
        """See :meth:`puna.data.engine.base.Engine.annotate`."""
        return map_shards(step, documents, out, kernel, self._workers, carry=carry)

    def judge(
        self, step: str, documents: Path, out: Path, kernel: Kernel, *, side: Path | None = None
    ) -> Manifest:
        """See :meth:`puna.data.engine.base.Engine.judge`."""
        return map_shards(step, documents, out, kernel, self._workers, side=side)

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
        schema = relation.schema().to_pyarrow()
        with contextlib.closing(self._stream(relation, order_by, schema)) as batches:
            if n_shards > 1:
                written = write_cut(folder, schema, batches)
                write_empty(folder, schema, sorted({*range(n_shards)} - {*written}))
                return
            with shard_writer(folder / shard_name(0), schema) as writer:
                for batch in batches:
                    writer.write(batch)

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
        batches = self._stream(relation, [by, *order_by], relation.schema().to_pyarrow())
        with shard_writer(folder / shard_name(0), kernel.adds()) as writer:
            for table in whole_groups(batches, by):
                for batch in kernel(table).to_batches():
                    writer.write(batch)
        return self.read(folder)

    def _stream(
        self, relation: ir.Table, order_by: Sequence[str], schema: pa.Schema
    ) -> Generator[pa.RecordBatch, None, None]:
        """Yield the rows in order, a batch at a time."""
        with _quiet():
            reader = self._relation(relation.order_by(list(order_by))).to_arrow_reader(STREAM_ROWS)
        for batch in reader:
            yield batch.cast(schema)  # DuckDB itself sums int64 to 128 bits

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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Ibis calling a method that DuckDB 2 renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fetch_arrow_table", category=DeprecationWarning)
        yield
