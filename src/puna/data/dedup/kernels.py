"""What deduplication computes per document and per LSH bucket, as kernels of the data engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from puna.data.dedup.sets import open_store, pack_sets
from puna.data.dedup.urls import url_hash
from puna.data.engine import Shard
from puna.data.engine.shards import VERDICT_FIELDS
from puna.data.kernels.buffers import Texts, texts_from, texts_of
from puna.data.kernels.components import link_buckets
from puna.data.kernels.jaccard import shingle_sets
from puna.data.kernels.minhash import N_PERMUTATIONS, band_keys, normalised, sign

SIGNATURE_BYTES = 4 * N_PERMUTATIONS


_NODE_FIELDS = [
    pa.field("node", pa.int64()),
    pa.field("shard", pa.int32()),
    pa.field("signature_hash", pa.binary(16)),
    pa.field("buckets", pa.list_(pa.int64())),
]
_TEXT_FIELDS = [
    pa.field("text_hash", pa.binary(16)),
    pa.field("url_hash", pa.binary(16)),
    pa.field("signature", pa.binary(SIGNATURE_BYTES)),
]


@dataclass(frozen=True)
class SignatureKernel:
    """Computes what documents are compared by.

    Columns: ``text_hash`` (xxh3-128 of the normalised text), ``url_hash`` (xxh3-128 of the
    normalised URL, null without one), ``signature`` (128 uint32), ``node`` (number of the row in
    the dataset), ``shard``, ``signature_hash``, ``buckets`` (a key per band).

    Attributes:
        n_bands: Bands of the signature.
        url_field: Metadata that holds the URL; None: URLs are not compared.
    """

    n_bands: int
    url_field: str | None = None
    columns: tuple[str, ...] = field(default=("text", "path", "metadata"), repr=False)

    def adds(self) -> pa.Schema:
        """Return the seven columns."""
        return pa.schema([*_TEXT_FIELDS, *_NODE_FIELDS])

    def prepare(self) -> None:
        """Compile."""
        texts = texts_from(["one two three four five six"])
        band_keys(sign(texts), self.n_bands)
        normalised(texts)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row of signatures per document."""
        signatures, compared = _text_columns(batch, self.url_field)
        arrays = [*compared, *_node_columns(signatures, shard, first_row, self.n_bands, 0)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


@dataclass(frozen=True)
class IndexKernel:
    """Computes what an index keeps of a document: hashes, signature and shingles.

    Attributes:
        url_field: Metadata that holds the URL.
    """

    url_field: str | None
    columns: tuple[str, ...] = field(default=("text", "path", "metadata"), repr=False)

    def adds(self) -> pa.Schema:
        """Return the four columns."""
        return pa.schema([*_TEXT_FIELDS, pa.field("shingles", pa.large_binary())])

    def prepare(self) -> None:
        """Compile."""
        SignatureKernel(1).prepare()

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document."""
        _, compared = _text_columns(batch, self.url_field)
        every = np.ones(batch.num_rows, bool)
        shingles = pack_sets(shingle_sets(texts_of(batch.column("text")), every))
        return pa.RecordBatch.from_arrays([*compared, shingles], schema=self.adds())


@dataclass(frozen=True)
class KnownKernel:
    """Gives the documents of an index their nodes, behind those of the new documents.

    Attributes:
        n_bands: Bands of the signature.
        first_node: Node of the index's first row.
    """

    n_bands: int
    first_node: int
    columns: tuple[str, ...] = field(default=("signature",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the four columns."""
        return pa.schema(_NODE_FIELDS)

    def prepare(self) -> None:
        """Compile."""
        band_keys(np.zeros((1, N_PERMUTATIONS), np.uint32), self.n_bands)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document."""
        signatures = signature_matrix(pa.chunked_array([batch.column("signature")]))
        arrays = _node_columns(signatures, shard, first_row, self.n_bands, self.first_node)
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


def _text_columns(
    batch: pa.RecordBatch, url_field: str | None
) -> tuple[np.ndarray, list[pa.Array]]:
    """Return the signatures, and the columns of :data:`_TEXT_FIELDS`."""
    texts = texts_of(batch.column("text"))
    signatures = sign(texts)
    urls: list[bytes | None] = [None] * batch.num_rows
    if url_field is not None:
        paths, metadata = batch.column("path").to_pylist(), batch.column("metadata").to_pylist()
        urls = [url_hash(*row, url_field) for row in zip(paths, metadata, strict=True)]
    return signatures, [
        pa.array(_hashes(normalised(texts)), pa.binary(16)),
        pa.array(urls, pa.binary(16)),
        pa.array([row.tobytes() for row in signatures], pa.binary(SIGNATURE_BYTES)),
    ]


def _node_columns(
    signatures: np.ndarray, shard: Shard, first_row: int, n_bands: int, first_node: int
) -> list[pa.Array]:
    """Return the columns of :data:`_NODE_FIELDS`."""
    n, first = len(signatures), first_node + shard.first_row + first_row
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * n_bands)
    hashes = [xxhash.xxh3_128_digest(row.data) for row in signatures]
    return [
        pa.array(np.arange(first, first + n, dtype=np.int64)),
        pa.array(np.full(n, shard.index, np.int32)),
        pa.array(hashes, pa.binary(16)),
        pa.ListArray.from_arrays(offsets, pa.array(band_keys(signatures, n_bands).ravel())),
    ]


def _hashes(texts: Texts) -> list[bytes]:
    return [xxhash.xxh3_128_digest(texts.bytes_of(index)) for index in range(len(texts))]


@dataclass(frozen=True)
class LinkKernel:
    """Finds the similar pairs of LSH buckets (rows: bucket, node, signature).

    Attributes:
        n_bands: Bands of the signatures.
        near: Similarity of near-duplicates.
        loose: Similarity inside clusters.
        n_new: Nodes from this one on are of an index.
        sets: Folder with the shingles of the nodes (:func:`puna.data.dedup.sets.write_store`);
            None: similarities are those of the signatures.
    """

    n_bands: int
    near: float
    loose: float
    n_new: int
    sets: Path | None = None

    def adds(self) -> pa.Schema:
        """Return the columns of a link: two nodes and their similarity."""
        return pa.schema(
            [
                pa.field("a", pa.int64()),
                pa.field("b", pa.int64()),
                pa.field("similarity", pa.float64()),
            ]
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the links of whole buckets."""
        pairs, similarities = link_buckets(
            table["bucket"].to_numpy(),
            table["node"].to_numpy(),
            signature_matrix(table["signature"]),
            n_bands=self.n_bands,
            near=self.near,
            loose=self.loose,
            sets=open_store(self.sets),
            n_new=self.n_new,
        )
        columns = [pa.array(pairs[:, 0]), pa.array(pairs[:, 1]), pa.array(similarities)]
        return pa.Table.from_arrays(columns, schema=self.adds())


def signature_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Return a binary column of signatures as uint32 [n, 128]."""
    parts = [
        np.frombuffer(value, np.uint32)
        for chunk in column.chunks
        for value in _values(chunk)
    ]  # fmt: skip
    return np.concatenate(parts).reshape(-1, N_PERMUTATIONS) if parts else _NO_SIGNATURES


_NO_SIGNATURES = np.empty((0, N_PERMUTATIONS), np.uint32)


def _values(chunk: pa.Array) -> list[memoryview]:
    """Return the bytes of all values of a chunk, end to end, as at most one buffer."""
    if len(chunk) == 0:
        return []
    data = chunk.buffers()[-1]
    if pa.types.is_fixed_size_binary(chunk.type):
        start, stop = chunk.offset, chunk.offset + len(chunk)
        return [memoryview(data)[start * SIGNATURE_BYTES : stop * SIGNATURE_BYTES]]
    offset_type = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
    offsets = np.frombuffer(chunk.buffers()[1], offset_type)
    start, stop = offsets[chunk.offset], offsets[chunk.offset + len(chunk)]
    return [memoryview(data)[start:stop]]


@dataclass(frozen=True)
class VerdictKernel:
    """Takes verdicts that a relational step has reached, from the side table.

    Attributes:
        extra: Further columns of the side table (strings) to append to the documents.
    """

    extra: tuple[str, ...] = ()
    columns: tuple[str, ...] = field(default=(), repr=False)

    def adds(self) -> pa.Schema:
        """Return the verdict columns and the extra ones (strings)."""
        return pa.schema([*VERDICT_FIELDS, *(pa.field(name, pa.string()) for name in self.extra)])

    def prepare(self) -> None:
        """Nothing to compile."""

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return the columns of the side table."""
        schema = self.adds()
        arrays = [batch.column(f.name).cast(f.type) for f in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)
