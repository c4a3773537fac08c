"""The shingles of the documents that may have a duplicate, for exact Jaccard similarities.

They lie in one file that is mapped into memory: 4 bytes per distinct shingle on disk (about half of
the text), and in memory only the place of each set, 8 bytes per document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from puna.data.engine import Shard
from puna.data.engine.shards import list_shards, read_batches
from puna.data.kernels.buffers import texts_from, texts_of
from puna.data.kernels.jaccard import NO_SETS, Sets, shingle_sets

_BATCH_ROWS = 4096


def pack_sets(sets: Sets) -> pa.Array:
    """Return sets as a ``large_binary`` column of little-endian uint32."""
    offsets = pa.py_buffer((sets.starts * 4).astype(np.int64))
    data = pa.py_buffer(np.ascontiguousarray(sets.values, "<u4"))
    return pa.Array.from_buffers(pa.large_binary(), len(sets.starts) - 1, [None, offsets, data])


@dataclass(frozen=True)
class ShingleKernel:
    """Computes the shingles of some documents: column ``shingles``, empty for the others.

    Attributes:
        wanted: File (numpy) with the numbers of these documents, ascending.
        digest: Of its content: finished shards are reused under it.
    """

    wanted: Path
    digest: str
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the column."""
        return pa.schema([pa.field("shingles", pa.large_binary())])

    def prepare(self) -> None:
        """Compile."""
        shingle_sets(texts_from(["one two three four five six"]), np.ones(1, bool))

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document."""
        first = shard.first_row + first_row
        wanted = np.load(self.wanted, mmap_mode="r")
        start, stop = np.searchsorted(wanted, [first, first + batch.num_rows])
        is_wanted = np.zeros(batch.num_rows, bool)
        is_wanted[wanted[start:stop] - first] = True
        column = pack_sets(shingle_sets(texts_of(batch.column("text")), is_wanted))
        return pa.RecordBatch.from_arrays([column], schema=self.adds())


def write_store(folder: Path, datasets: list[tuple[Path, np.ndarray | None]]) -> None:
    """Bring the shingles of all nodes into one file.

    Args:
        folder: New folder.
        datasets: Datasets with a column ``shingles``, in the order of the nodes; with the rows to
            take, ascending (the others get empty sets), or None for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [np.zeros(1, np.int64)]
    with (folder / "values.u32").open("wb") as file:
        for dataset, rows in datasets:
            for first, packed in _packed(dataset):
                sizes, data = _chosen(packed, rows, first)
                lengths.append(sizes)
                file.write(data)
    np.save(folder / "starts.npy", np.cumsum(np.concatenate(lengths)))


def _packed(dataset: Path) -> Iterator[tuple[int, pa.Array]]:
    first = 0
    for shard in list_shards(dataset):
        for batch in read_batches(shard.path, ["shingles"], _BATCH_ROWS):
            yield first, batch.column("shingles").cast(pa.large_binary())
            first += batch.num_rows


def _chosen(
    packed: pa.Array, rows: np.ndarray | None, first: int
) -> tuple[np.ndarray, bytes | memoryview]:
    """Return the number of shingles of each row and the bytes of the chosen ones."""
    if rows is not None:
        start, stop = np.searchsorted(rows, [first, first + len(packed)])
        chosen = np.zeros(len(packed), bool)
        chosen[rows[start:stop] - first] = True
        empty = pa.scalar(b"", pa.large_binary())
        packed = pc.call_function("if_else", [pa.array(chosen), packed, empty])
    offsets = np.frombuffer(packed.buffers()[1], np.int64)
    offsets = offsets[packed.offset : packed.offset + len(packed) + 1]
    data = packed.buffers()[2]
    content = b"" if data is None else memoryview(data)[offsets[0] : offsets[-1]]
    return np.diff(offsets) // 4, content


def open_store(folder: Path | None) -> Sets:
    """Map the file into memory; without a folder there is nothing to verify with."""
    if folder is None:
        return NO_SETS
    starts = np.load(folder / "starts.npy")
    if starts[-1] == 0:
        return Sets(np.empty(0, np.uint32), starts)
    return Sets(np.memmap(folder / "values.u32", "<u4", mode="r"), starts)
