"""The passes over the text: count fingerprints, describe blocks, fetch their bytes, cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from puna.core.errors import PunaError
from puna.data.engine import Shard
from puna.data.engine.shards import VERDICT_FIELDS, read_columns
from puna.data.kernels.buffers import Texts, texts_from, texts_of
from puna.data.lines.kernels import count_keys
from puna.data.lines.passes import strings_of
from puna.data.schema import shard_name
from puna.data.substrings.compare import KEY_FIELDS
from puna.data.substrings.spans import PLACE, without_spans
from puna.data.substrings.winnow import Blocks, copy_pieces, describe_blocks, find_blocks

_COUNTS = pa.list_(pa.struct([("key", pa.int64()), ("n", pa.int64())]))
_BLOCK = pa.struct(
    [*KEY_FIELDS, *((name, pa.int64()) for name in ("start", "n_windows", "repeats"))]
)
_TEXT = pa.struct([*KEY_FIELDS, pa.field("bytes", pa.large_binary())])


@dataclass(frozen=True)
class WindowRule:
    """What is compared.

    Attributes:
        size: Bytes of a window: the shortest passage that is found.
        skip_sources: Sources whose documents are neither compared nor changed.
    """

    size: int
    skip_sources: tuple[str, ...]

    def taken(self, sources: pa.Array) -> np.ndarray:
        """Tell which documents are of a source that is not skipped: bool [n_docs]."""
        names = sources.to_numpy(zero_copy_only=False).astype(str)
        return ~np.isin(names, np.array(self.skip_sources, str))

    def blocks(self, texts: Texts, sources: pa.Array) -> Blocks:
        """Find the blocks of a batch."""
        return find_blocks(texts, self.taken(sources), self.size)


def _sample(rule: WindowRule) -> tuple[pa.RecordBatch, Shard]:
    """Return a batch that the kernels are compiled with."""
    text = "one two three four " * (1 + rule.size // 8)
    arrays = [pa.array(["i"]), pa.array(["s"]), pa.array([text], pa.large_string())]
    return pa.RecordBatch.from_arrays(arrays, ["id", "source", "text"]), Shard(0, Path(), 1, 0)


def _nodes(shard: Shard, first_row: int, n: int) -> pa.Array:
    return pa.array(shard.first_row + first_row + np.arange(n, dtype=np.int64))


def _lists(ends: np.ndarray, items: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), items)


@dataclass(frozen=True)
class FingerprintKernel:
    """Counts the fingerprints of each batch.

    Columns: ``node`` (number of the document in the dataset), ``shard``, ``counts`` (fingerprint
    and count in the batch of those that come first in this document).

    Attributes:
        rule: What is compared.
    """

    rule: WindowRule
    columns: tuple[str, ...] = field(default=("id", "source", "text"), repr=False)

    def adds(self) -> pa.Schema:
        """Return the three columns."""
        return pa.schema([("node", pa.int64()), ("shard", pa.int64()), ("counts", _COUNTS)])

    def prepare(self) -> None:
        """Compile."""
        self(*_sample(self.rule), 0)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document.

        Raises:
            PunaError: A document is too large to have places.
        """
        texts = texts_of(batch.column("text"))
        sizes = np.diff(texts.offsets) * self.rule.taken(batch.column("source"))
        if sizes.max(initial=0) >= PLACE:
            row = int(np.argmax(sizes))
            raise PunaError(
                f"data.substrings: document {batch.column('id')[row]} of {shard.path} has "
                f"{sizes[row]:,} bytes; at most {PLACE - 1:,} can be compared",
                "drop documents of that length before (data.filter), or name the source in "
                "`skip_sources`",
            )
        blocks = self.rule.blocks(texts, batch.column("source"))
        keys, counts, ends = count_keys(blocks.keys, blocks.bounds)
        values = [pa.array(keys.view(np.int64)), pa.array(counts)]
        items = pa.StructArray.from_arrays(values, fields=list(_COUNTS.value_type))
        n = batch.num_rows
        arrays = [
            _nodes(shard, first_row, n), pa.array(np.full(n, shard.index)), _lists(ends, items),
        ]  # fmt: skip
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


@dataclass(frozen=True)
class BlockKernel:
    """Describes the blocks of each document whose fingerprint occurs more than once.

    Columns: ``node``, ``blocks``.

    Attributes:
        rule: What is compared.
        tables_hash: Digest of the repeated fingerprints.
        tables: Folder of them.
    """

    rule: WindowRule
    tables_hash: str
    tables: Path = field(repr=False)
    columns: tuple[str, ...] = field(default=("source", "text"), repr=False)

    def adds(self) -> pa.Schema:
        """Return the two columns."""
        return pa.schema([("node", pa.int64()), ("blocks", pa.list_(_BLOCK))])

    def prepare(self) -> None:
        """Compile, and open the table."""
        self(*_sample(self.rule), 0)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document."""
        texts = texts_of(batch.column("text"))
        blocks = self.rule.blocks(texts, batch.column("source"))
        table, used = _load_table(self.tables, self.tables_hash)
        rows, ends = describe_blocks(texts, blocks, self.rule.size, table, used)
        values = [pa.array(np.ascontiguousarray(rows[:, k])) for k in range(rows.shape[1])]
        items = pa.StructArray.from_arrays(values, fields=list(_BLOCK))
        arrays = [_nodes(shard, first_row, batch.num_rows), _lists(ends, items)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


@lru_cache(maxsize=1)
def _load_table(folder: Path, tables_hash: str) -> tuple[np.ndarray, np.ndarray]:
    """Map the table of repeated fingerprints into memory, so that worker processes share it."""
    table, used = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("keys", "firsts"))
    return table, used


@dataclass(frozen=True)
class TextKernel:
    """Fetches the bytes of one of each kind of block that must be compared with others.

    Attributes:
        size: Bytes of a window.
        wanted_hash: Digest of the wanted blocks.
        wanted: Folder with a shard of them per shard of documents: node, start, n_windows and what
            identifies the block, ordered by node and start.
    """

    size: int
    wanted_hash: str
    wanted: Path = field(repr=False)
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the column ``text``, a list, and ``n_bytes``, which bounds the row groups."""
        return pa.schema([("text", pa.list_(_TEXT)), ("n_bytes", pa.int64())])

    def prepare(self) -> None:
        """Compile."""
        copy_pieces(texts_from(["ab"]), np.zeros(1, np.int64), np.ones(1, np.int64))

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document."""
        texts = texts_of(batch.column("text"))
        wanted = _read_wanted(self.wanted / shard_name(shard.index), self.wanted_hash)
        first = shard.first_row + first_row
        nodes = wanted["node"].to_numpy()
        ends = np.searchsorted(nodes, np.arange(first, first + batch.num_rows + 1))
        part = wanted.slice(ends[0], ends[-1] - ends[0])
        starts = texts.offsets[part["node"].to_numpy() - first] + part["start"].to_numpy()
        pieces = copy_pieces(texts, starts, part["n_windows"].to_numpy() + self.size - 1)
        buffers = [None, pa.py_buffer(pieces.offsets), pa.py_buffer(pieces.data)]
        values = pa.Array.from_buffers(pa.large_binary(), len(pieces), buffers)
        keys = [part[one.name].combine_chunks() for one in KEY_FIELDS]
        items = pa.StructArray.from_arrays([*keys, values], fields=list(_TEXT))
        ends -= ends[0]
        arrays = [_lists(ends, items), pa.array(np.diff(pieces.offsets[ends]))]
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


@lru_cache(maxsize=1)
def _read_wanted(path: Path, wanted_hash: str) -> pa.Table:
    names = [one.name for one in KEY_FIELDS]
    return read_columns(path, ["node", "start", "n_windows", *names]).combine_chunks()


@dataclass(frozen=True)
class CutKernel:
    """Cuts the spans of the side table out of texts; its verdict is that of the side table.

    Attributes:
        border: What is cut begins and ends with a whole character, word or line.
    """

    border: str
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the verdict, the new text and what was cut from it."""
        return pa.schema(
            [
                *VERDICT_FIELDS,
                pa.field("text", pa.large_string()),
                pa.field("passages_cut", pa.int32()),
                pa.field("passage_bytes_cut", pa.int64()),
            ]
        )

    def prepare(self) -> None:
        """Compile."""
        without_spans(texts_from(["ab cd"]), np.array([0, 2]), np.array([0, 2]), self.border)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return verdict and text of each document."""
        texts = texts_of(batch.column("text"))
        spans, bounds = _flat(batch.column("spans"))
        left, n_cut = without_spans(texts, spans, bounds, self.border)
        cut = np.diff(texts.offsets) - np.diff(left.offsets)
        verdict: Sequence[pa.Array] = [
            batch.column(f"substring_{name}") for name in ("reason", "value", "threshold")
        ]
        arrays = [
            *verdict, pa.nulls(batch.num_rows, pa.string()), strings_of(left),
            pa.array(n_cut, pa.int32()), pa.array(cut, pa.int64()),
        ]  # fmt: skip
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


def _flat(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of lists and their bounds; null is an empty list."""
    sizes = lists.value_lengths().fill_null(0).to_numpy()
    values = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.int64)
    return values, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
