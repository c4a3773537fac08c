"""Parquet shards: listing, deterministic writing, order-free digests of ids."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path
from puna.data.engine.base import Flow, Shard, add_flow, empty_flow
from puna.data.schema import REJECTION_FIELDS, shard_name

VERDICT_FIELDS = [
    pa.field("reason", pa.string()),
    pa.field("value", pa.float64()),
    pa.field("threshold", pa.float64()),
    pa.field("detail", pa.string()),
]
"""A kernel's verdict on a row: ``reason`` is null for a kept row."""

ROW_GROUP_ROWS = 2048
ROW_GROUP_BYTES = 32 << 20
NARROW_ROW_GROUP_ROWS = 65536
_REBUILD = "remove the stage's folder and run the stage again"
_SHARD_NAME = re.compile(r"part-\d{5,}\.parquet")
_DICTIONARY_COLUMNS = ("source", "step", "reason", "language", "split")
_STATISTICS_COLUMNS = ("id", "n_bytes")


def list_shards(folder: Path) -> list[Shard]:
    """List the shards of a dataset.

    Raises:
        PunaError: The folder or a shard is missing, a file is unreadable, or the folder holds
            anything else (engines skip such files silently).
    """
    if not folder.is_dir():
        raise PunaError(f"{folder} does not exist", "run the stage that writes it first")
    names = sorted(path.name for path in folder.iterdir())
    strange = [name for name in names if not _SHARD_NAME.fullmatch(name)]
    if strange:
        raise PunaError(f"{folder} holds {strange[0]!r}, which is not a shard",
                        "move it out of the folder")  # fmt: skip
    expected = [shard_name(index) for index in range(len(names))]
    if names != expected or not names:
        missing = sorted(set(expected) - set(names)) or [shard_name(0)]
        raise PunaError(f"{folder}: shard {missing[0]} is missing", _REBUILD)
    shards, first_row = [], 0
    for index, name in enumerate(names):
        n_rows = open_shard(folder / name).metadata.num_rows
        shards.append(Shard(index, folder / name, n_rows, first_row))
        first_row += n_rows
    return shards


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        PunaError: It is missing or damaged.
    """
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise PunaError(f"{path}: not a readable Parquet file ({why})", _REBUILD) from error


def read_batches(path: Path, columns: list[str] | None, n_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a shard in batches of at most ``n_rows``.

    Raises:
        PunaError: The file is damaged.
    """
    with contextlib.closing(open_shard(path)) as file:
        try:
            yield from file.iter_batches(batch_size=n_rows, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            why = str(error).splitlines()[0]
            raise PunaError(f"{path}: damaged Parquet file ({why})", _REBUILD) from error


def read_columns(path: Path, columns: list[str]) -> pa.Table:
    """Read some columns of a shard."""
    with contextlib.closing(open_shard(path)) as file:
        return file.read(columns=columns, use_threads=False)


class ShardWriter:
    """Writes one Parquet file whose bytes depend on the rows alone, not on how they arrive.

    Row groups are cut by counting rows and document bytes, so neither batch sizes nor the number of
    workers or threads show in the file.

    Args:
        path: File to write (use :func:`shard_writer` for an atomic one).
        schema: Columns.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        names = schema.names
        self._schema = schema
        self._by_bytes = "n_bytes" in names and "text" in names
        self._max_rows = ROW_GROUP_ROWS if "text" in names else NARROW_ROW_GROUP_ROWS
        self._pending: list[pa.RecordBatch] = []
        self._n_rows, self._n_bytes = 0, 0
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", compression_level=3, version="2.6",
            use_dictionary=[name for name in _DICTIONARY_COLUMNS if name in names],
            write_statistics=[name for name in _STATISTICS_COLUMNS if name in names],
        )  # fmt: skip

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        while batch.num_rows:
            n_take, full = self._room(batch)
            self._pending.append(batch.slice(0, n_take))
            batch = batch.slice(n_take)
            if full:
                self._flush()

    def _room(self, batch: pa.RecordBatch) -> tuple[int, bool]:
        """Rows of the batch that still go into the row group, and whether it is full then."""
        n_take = min(batch.num_rows, self._max_rows - self._n_rows)
        if self._by_bytes:
            sizes = batch.column("n_bytes").slice(0, n_take).to_numpy(zero_copy_only=False)
            totals = self._n_bytes + np.cumsum(sizes)
            n_take = min(n_take, int(np.searchsorted(totals, ROW_GROUP_BYTES)) + 1)
            self._n_bytes = int(totals[n_take - 1])
        self._n_rows += n_take
        return n_take, self._n_rows >= self._max_rows or self._n_bytes >= ROW_GROUP_BYTES

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending, self._schema).combine_chunks()
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self._pending, self._n_rows, self._n_bytes = [], 0, 0

    def close(self) -> None:
        """Write what is pending and the footer."""
        self._flush()
        self._writer.close()

    def abandon(self) -> None:
        """Close the file without caring for its content."""
        self._pending = []
        self._writer.close()


@contextlib.contextmanager
def shard_writer(path: Path, schema: pa.Schema) -> Iterator[ShardWriter]:
    """Write a shard atomically: it appears under its name complete, or not at all."""
    with atomic_path(path) as temporary:
        writer = ShardWriter(temporary, schema)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        writer.close()


def write_shard(path: Path, table: pa.Table) -> None:
    """Write a whole table as one shard, atomically."""
    with shard_writer(path, table.schema) as writer:
        for batch in table.to_batches():
            writer.write(batch)


def rejected_schema(documents: pa.Schema) -> pa.Schema:
    """Return the schema of ``rejected/`` for documents with the given columns."""
    return pa.schema([*documents, *REJECTION_FIELDS])


def ids_digest(ids: pa.ChunkedArray | pa.Array) -> str:
    """Return an order-free digest of ids: count and sum of their xxh3-128 modulo 2**128.

    A sum, not an exclusive or: an id that is there twice changes it.
    """
    total = 0
    for value in ids.cast(pa.binary()).to_pylist():
        total += xxhash.xxh3_128_intdigest(value)
    return f"{len(ids)}:{total % 2**128:032x}"


def add_digests(*digests: str) -> str:
    """Return the digest of the union (with repetition) of sets of ids."""
    count, total = 0, 0
    for digest in digests:
        n, _, value = digest.partition(":")
        count += int(n)
        total += int(value, 16)
    return f"{count}:{total % 2**128:032x}"


def is_ordered(ids: pa.ChunkedArray | pa.Array) -> bool:
    """Tell whether ids are strictly ascending (ordered and without repetition)."""
    flat = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    if len(flat) < 2:
        return True
    ascending = pc.call_function("less", [flat.slice(0, len(flat) - 1), flat.slice(1)])
    return ascending.false_count == 0


def shard_flow(given: pa.Table, kept: pa.Table, rejected: pa.Table) -> Flow:
    """Count documents and bytes per source and reason.

    Args:
        given: What was read; columns source, n_bytes.
        kept: Columns source, n_bytes.
        rejected: Columns source, n_bytes, reason.
    """
    flow: Flow = {}
    for what, table in (("in", given), ("kept", kept)):
        for row in _sums(table, ["source"]):
            part = {**empty_flow(), f"{what}_docs": row["docs"], f"{what}_bytes": row["bytes"]}
            add_flow(flow.setdefault(row["source"], empty_flow()), part)
    for row in _sums(rejected, ["source", "reason"]):
        counts = {"docs": row["docs"], "bytes": row["bytes"]}
        part = {**empty_flow(), "rejected": {row["reason"]: counts}}
        add_flow(flow.setdefault(row["source"], empty_flow()), part)
    return flow


def _sums(table: pa.Table, by: list[str]) -> list[dict[str, Any]]:
    sums = table.group_by(by, use_threads=False).aggregate(
        [("n_bytes", "sum"), ("n_bytes", "count")]
    )
    sums = sums.rename_columns([*by, "bytes", "docs"])
    return sums.sort_by([(name, "ascending") for name in by]).to_pylist()
