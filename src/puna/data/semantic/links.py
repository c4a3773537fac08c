"""Pairs of similar embeddings inside a cluster, and the choice of what stands for a group.

Both look at blocks of a matrix product, so memory is that of the cluster's embeddings (a byte per
dimension and document) and one block.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, fixed, kernel
from puna.data.kernels.components import find, unite
from puna.data.semantic.clusters import squares_of

_BLOCK = 2048


@kernel
def _join(
    products: Array, squares: Array, floors: Array, row: Int, column: Int, nodes: Array,
    limits: Array, parents: Array, edges: Array, found: Array, n_edges: Int,
) -> Int:  # fmt: skip
    """Write the pairs of a block that join two components; return the number of all."""
    threshold, n_new = limits
    for i in range(products.shape[0]):
        a = row + i
        for j in range(products.shape[1]):
            b = column + j
            if b <= a or products[i, j] < floors[a] * floors[b]:
                continue  # almost all pairs end here, without a root and a division
            likeness = products[i, j] / np.sqrt(squares[a] * squares[b])
            if likeness < threshold or (nodes[a] >= n_new and nodes[b] >= n_new):
                continue
            if find(parents, a) != find(parents, b):
                unite(parents, a, b)
                edges[n_edges, 0], edges[n_edges, 1] = nodes[a], nodes[b]
                found[n_edges] = likeness
                n_edges += 1
    return n_edges


def link_cluster(
    nodes: np.ndarray, vectors: np.ndarray, *, threshold: float, n_new: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find pairs that connect the same documents as all pairs of a cluster do.

    Every pair is compared; one whose documents are connected already by earlier ones is not
    written, so there are fewer pairs than documents.

    Args:
        nodes: int64 [n], ascending.
        vectors: int8 [n, dim].
        threshold: Cosine from which two are linked.
        n_new: Nodes from this one on are of an index; pairs of two of them are left out.

    Returns:
        Pairs int64 [n_links, 2] (smaller node first) and their cosines float64 [n_links].
    """
    n, n_edges = len(nodes), 0
    wide, squares = vectors.astype(np.float32), squares_of(vectors)
    floors = fixed(np.sqrt(squares * (0.999 * threshold)))
    parents = np.arange(n)
    edges, found = np.empty((max(n - 1, 0), 2), np.int64), np.empty(max(n - 1, 0), np.float64)
    for row in range(0, n, _BLOCK):
        for column in range(row, n, _BLOCK):
            products = wide[row : row + _BLOCK] @ wide[column : column + _BLOCK].T
            n_edges = _join(
                fixed(products), fixed(squares), floors, row, column, fixed(nodes),
                (float(threshold), int(n_new)), parents, edges, found, n_edges,
            )  # fmt: skip
    return edges[:n_edges], found[:n_edges]


def choose_keepers(
    nodes: np.ndarray, vectors: np.ndarray, *, threshold: float, n_new: int, chains: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Decide which members of a group stay, and for which of these the others go.

    Without ``chains`` greedily, in the given order: a document stays when its cosine with all that
    stay already is below the threshold, else it goes for the most similar of them. With ``chains``
    the first one stays, and all others go for it. Documents of an index always stay.

    Args:
        nodes: int64 [n], the best first; those of an index before the others.
        vectors: int8 [n, dim].
        threshold: Cosine of duplicates.
        n_new: Nodes from this one on are of an index.
        chains: One document stands for the whole group.

    Returns:
        The kept node of each, int64 [n], and the cosine with it, float64 [n].
    """
    wide, squares = vectors.astype(np.float32), squares_of(vectors)
    keeper, found = nodes.copy(), np.ones(len(nodes))
    if chains:
        known = nodes >= n_new
        rest = np.flatnonzero(~known) if known.any() else np.arange(1, len(nodes))
        keeper[rest] = nodes[0]
        found[rest] = (wide[rest] @ wide[0]) / np.sqrt(squares[rest] * squares[0])
        return keeper, found
    kept = np.empty_like(wide)
    kept_at: list[int] = []
    for at in range(len(nodes)):
        if nodes[at] < n_new and kept_at:
            likeness = (kept[: len(kept_at)] @ wide[at]) / np.sqrt(squares[kept_at] * squares[at])
            best = int(likeness.argmax())
            if likeness[best] >= threshold:
                keeper[at], found[at] = nodes[kept_at[best]], likeness[best]
                continue
        kept[len(kept_at)] = wide[at]
        kept_at.append(at)
    return keeper, found
