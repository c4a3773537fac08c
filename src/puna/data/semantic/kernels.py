"""What semantic deduplication computes per document, cluster and group: kernels of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from puna.data.engine import Shard
from puna.data.semantic.clusters import nearest, quantise
from puna.data.semantic.embedder import Embedder, cached_embedder
from puna.data.semantic.links import choose_keepers, link_cluster
from puna.data.semantic.passages import Passages

_NODE_FIELDS = [
    pa.field("node", pa.int64()),
    pa.field("shard", pa.int32()),
    pa.field("embedding_hash", pa.binary()),
]


@dataclass(frozen=True)
class EmbedKernel:
    """Computes embeddings.

    Columns: ``embedding`` (an int8 per dimension), ``node`` (number of the row in the dataset),
    ``shard``, ``embedding_hash`` (xxh3-128; null for a text without tokens).

    Attributes:
        digest: Of the embedder.
        passages: How texts are cut.
        folder: Of the embedder; where it lies does not change the result.
        device: Where an encoder runs.
    """

    digest: str
    passages: Passages
    folder: str = field(repr=False)
    device: str = field(repr=False)
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the four columns."""
        return pa.schema([pa.field("embedding", pa.binary()), *_NODE_FIELDS])

    def prepare(self) -> None:
        """Compile."""
        self.embedder().embed(["one two three"])

    def embedder(self) -> Embedder:
        """Return the embedder of this process."""
        return cached_embedder(self.folder, self.digest, self.passages, self.device)

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one embedding per document."""
        vectors = quantise(self.embedder().embed(batch.column("text").to_pylist()))
        column = pa.array([row.tobytes() for row in vectors], pa.binary())
        arrays = [column, *_node_columns(vectors, shard, first_row, 0)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


@dataclass(frozen=True)
class KnownKernel:
    """Gives the documents of an index their nodes, behind those of the new documents.

    Attributes:
        first_node: Node of the index's first row.
    """

    first_node: int
    columns: tuple[str, ...] = field(default=("embedding",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the three columns."""
        return pa.schema(_NODE_FIELDS)

    def prepare(self) -> None:
        """Nothing to compile."""

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return one row per document."""
        vectors = embedding_matrix(batch.column("embedding"))
        arrays = _node_columns(vectors, shard, first_row, self.first_node)
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


def _node_columns(
    vectors: np.ndarray, shard: Shard, first_row: int, first_node: int
) -> list[pa.Array]:
    n, first = len(vectors), first_node + shard.first_row + first_row
    hashes = [xxhash.xxh3_128_digest(row.data) if row.any() else None for row in vectors]
    return [
        pa.array(np.arange(first, first + n, dtype=np.int64)),
        pa.array(np.full(n, shard.index, np.int32)),
        pa.array(hashes, pa.binary()),
    ]


def embedding_matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return a column of embeddings as int8 [n, dim] ([0, 1] without rows)."""
    if len(column) == 0:
        return np.empty((0, 1), np.int8)
    return np.frombuffer(b"".join(column.to_pylist()), np.int8).reshape(len(column), -1)


@dataclass(frozen=True)
class AssignKernel:
    """Finds the clusters of embeddings.

    Column ``clusters``: numbers of the nearest centroids, the nearest first.

    Attributes:
        digest: Of the centroids.
        probes: How many clusters.
        path: File with the centroids, int8 [n_clusters, dim].
    """

    digest: str
    probes: int
    path: Path = field(repr=False)
    columns: tuple[str, ...] = field(default=("embedding",), repr=False)

    def adds(self) -> pa.Schema:
        """Return the column."""
        return pa.schema([pa.field("clusters", pa.list_(pa.int32()))])

    def prepare(self) -> None:
        """Nothing to compile."""

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return the clusters of each document."""
        centroids = np.load(self.path)
        n = min(self.probes, len(centroids))
        chosen, _ = nearest(embedding_matrix(batch.column("embedding")), centroids, n)
        offsets = pa.array(np.arange(batch.num_rows + 1, dtype=np.int32) * n)
        clusters = pa.ListArray.from_arrays(offsets, pa.array(chosen.ravel(), pa.int32()))
        return pa.RecordBatch.from_arrays([clusters], schema=self.adds())


def _whole(table: pa.Table, by: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (name, nodes, embeddings) of each group of a table."""
    names = table[by].to_numpy()
    starts = np.flatnonzero(np.diff(names, prepend=names[:1] - 1))
    for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
        part = table.slice(start, end - start)
        yield int(names[start]), part["node"].to_numpy(), embedding_matrix(part["embedding"])


@dataclass(frozen=True)
class LinkKernel:
    """Finds the similar pairs of clusters (rows: cluster, node, embedding).

    Attributes:
        threshold: Cosine of duplicates.
        n_new: Nodes from this one on are of an index.
    """

    threshold: float
    n_new: int

    def adds(self) -> pa.Schema:
        """Return the columns of a link: two nodes and their cosine."""
        return pa.schema(
            [
                pa.field("a", pa.int64()),
                pa.field("b", pa.int64()),
                pa.field("cosine", pa.float64()),
            ]
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the links of whole clusters."""
        pairs, found = [np.empty((0, 2), np.int64)], [np.empty(0)]
        for _, nodes, vectors in _whole(table, "cluster"):
            links = link_cluster(nodes, vectors, threshold=self.threshold, n_new=self.n_new)
            pairs.append(links[0])
            found.append(links[1])
        edges = np.concatenate(pairs)
        columns = [pa.array(edges[:, 0]), pa.array(edges[:, 1]), pa.array(np.concatenate(found))]
        return pa.Table.from_arrays(columns, schema=self.adds())


@dataclass(frozen=True)
class KeeperKernel:
    """Chooses the documents of groups that stay (rows: group, rank, node, embedding).

    Attributes:
        threshold: Cosine of duplicates.
        n_new: Nodes from this one on are of an index.
        chains: One document stands for a whole group.
    """

    threshold: float
    n_new: int
    chains: bool

    def adds(self) -> pa.Schema:
        """Return the columns: a node, the node that is kept for it, their cosine."""
        return pa.schema(
            [
                pa.field("node", pa.int64()),
                pa.field("keeper", pa.int64()),
                pa.field("cosine", pa.float64()),
            ]
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the choice for whole groups."""
        columns: tuple[list[np.ndarray], ...] = (
            [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0)]
        )  # fmt: skip
        for _, nodes, vectors in _whole(table, "group"):
            keepers, found = choose_keepers(
                nodes, vectors, threshold=self.threshold, n_new=self.n_new, chains=self.chains
            )
            for column, part in zip(columns, (nodes, keepers, found), strict=True):
                column.append(part)
        arrays = [pa.array(np.concatenate(column)) for column in columns]
        return pa.Table.from_arrays(arrays, schema=self.adds())
