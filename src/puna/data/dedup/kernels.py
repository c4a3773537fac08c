"""What deduplication computes per document and per LSH bucket, as kernels of the data engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import xxhash

from puna.data.engine import Shard
from puna.data.engine.shards import VERDICT_FIELDS
from puna.data.kernels.buffers import Texts, texts_from, texts_of
from puna.data.kernels.components import link_buckets
from puna.data.kernels.minhash import N_PERMUTATIONS, band_keys, normalised, sign

SIGNATURE_BYTES = 4 * N_PERMUTATIONS


@dataclass(frozen=True)
class SignatureKernel:
    """Computes what documents are compared by.

    Columns: ``node`` (number of the row in the dataset), ``shard``, ``text_hash`` (xxh3-128 of the
    normalised text), ``signature`` (128 uint32), ``signature_hash``, ``buckets`` (a key per band).

    Attributes:
        n_bands: Bands of the signature.
    """

    n_bands: int
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the six columns."""
        return pa.schema(
            [
                pa.field("node", pa.int64()),
                pa.field("shard", pa.int32()),
                pa.field("text_hash", pa.binary(16)),
                pa.field("signature", pa.binary(SIGNATURE_BYTES)),
                pa.field("signature_hash", pa.binary(16)),
                pa.field("buckets", pa.list_(pa.int64())),
            ]
        )

    def prepare(self) -> None:
        """Compile."""
        texts = texts_from(["one two three four five six"])
        band_keys(sign(texts), self.n_bands)
        normalised(texts)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row of signatures per document."""
        texts = texts_of(batch.column("text"))
        n = len(texts)
        signatures = sign(texts)
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * self.n_bands)
        buckets = pa.array(band_keys(signatures, self.n_bands).ravel())
        first = shard.first_row + first_row
        arrays = [
            pa.array(np.arange(first, first + n, dtype=np.int64)),
            pa.array(np.full(n, shard.index, np.int32)),
            pa.array(_hashes(normalised(texts)), pa.binary(16)),
            pa.array([row.tobytes() for row in signatures], pa.binary(SIGNATURE_BYTES)),
            pa.array([xxhash.xxh3_128_digest(row.data) for row in signatures], pa.binary(16)),
            pa.ListArray.from_arrays(offsets, buckets),
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


def _hashes(texts: Texts) -> list[bytes]:
    return [xxhash.xxh3_128_digest(texts.bytes_of(index)) for index in range(len(texts))]


@dataclass(frozen=True)
class LinkKernel:
    """Finds the similar pairs of LSH buckets (rows: bucket, node, signature).

    Attributes:
        n_bands: Bands of the signatures.
        near: Similarity of near-duplicates.
        loose: Similarity inside clusters.
    """

    n_bands: int
    near: float
    loose: float

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
