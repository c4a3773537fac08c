"""Writing the files of an export: Parquet or JSON lines; equal input gives equal bytes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from puna.core.fsio import atomic_path
from puna.data.engine.shards import ShardWriter, read_batches
from puna.data.export.corpus import LICENCE, Corpus, licence_columns, licences
from puna.data.export.plan import COPY_COLUMN, ExportFile

_BATCH_ROWS = 1024
_ZSTD_LEVEL, _GZIP_LEVEL = 3, 6


def export_schema(corpus: Corpus, columns: list[str]) -> pa.Schema:
    """Return the schema of the exported files."""
    added = {
        LICENCE: pa.field(LICENCE, pa.string()),
        COPY_COLUMN: pa.field(COPY_COLUMN, pa.int32()),
    }
    own = {one.name: one for one in corpus.schema}
    return pa.schema([own.get(name) or added[name] for name in columns])


def split_rows(corpus: Corpus, split: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the documents of a split in the order of the shards, with the columns of the export."""
    schema = export_schema(corpus, columns)
    read = ["split", *(["repeat"] if COPY_COLUMN in columns else []),
            *(name for name in columns if name in corpus.schema.names)]  # fmt: skip
    if LICENCE in columns:
        read += licence_columns(corpus.schema)
    for shard in corpus.shards:
        for batch in read_batches(shard.path, list(dict.fromkeys(read)), _BATCH_ROWS):
            rows = batch.filter(pc.call_function("equal", [batch.column("split"), split]))
            found = {name: rows.column(name) for name in rows.schema.names}
            if LICENCE in columns:
                found[LICENCE] = pa.array(licences(rows), pa.string())
            if COPY_COLUMN in columns:
                found[COPY_COLUMN] = rows.column("repeat")  # divided by `with_copies`
            yield pa.RecordBatch.from_arrays([found[name] for name in columns], schema=schema)


def with_copies(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Write every document as often as its column ``copy`` says, numbered from 0."""
    times = batch.column(COPY_COLUMN).to_pylist()
    rows = [row for row, n in enumerate(times) for _ in range(n)]
    numbers = [number for n in times for number in range(n)]
    taken = batch.take(pa.array(rows, pa.int64()))
    columns = dict(zip(taken.schema.names, taken.columns, strict=True))
    columns[COPY_COLUMN] = pa.array(numbers, pa.int32())
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=batch.schema)


def write_file(
    path: Path, file: ExportFile, batches: Iterable[pa.RecordBatch], schema: pa.Schema
) -> tuple[int, int]:
    """Write one file; it appears complete, or not at all.

    Args:
        path: Where to.
        file: What it is; its name tells the format.
        batches: Its rows.
        schema: Their columns.

    Returns:
        Rows written, and the UTF-8 bytes of their texts.
    """
    n_rows = n_bytes = 0
    with atomic_path(path) as temporary:
        if file.name.endswith(".parquet"):
            writer = ShardWriter(temporary, schema)
            try:
                for batch in batches:
                    writer.write(batch)
                    n_rows += batch.num_rows
                    n_bytes += _text_bytes(batch)
            except BaseException:
                writer.abandon()
                raise
            writer.close()
        else:
            with _text_file(temporary, file.name) as lines:
                for batch in batches:
                    for row in batch.to_pylist():
                        text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
                        lines.write(text.encode() + b"\n")
                    n_rows += batch.num_rows
                    n_bytes += _text_bytes(batch)
    return n_rows, n_bytes


def _text_bytes(batch: pa.RecordBatch) -> int:
    sizes = pc.call_function("binary_length", [batch.column("text")])
    return int(sum(sizes.to_pylist()))


@contextlib.contextmanager
def _text_file(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file for lines; neither its name nor the time shows in what is compressed."""
    with path.open("wb") as raw:
        if name.endswith(".gz"):
            with gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as packed:
                yield cast("IO[bytes]", packed)
        elif name.endswith(".zst"):
            packer = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
            with (
                packer.stream_writer(raw, closefd=False) as stream,
                io.BufferedWriter(cast("io.RawIOBase", stream)) as buffered,
            ):
                yield buffered
        else:
            yield raw


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
