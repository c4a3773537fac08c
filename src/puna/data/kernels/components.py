"""Similar pairs inside LSH buckets, and connected components by union-find."""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, fixed, kernel


@kernel
def find(parents: Array, node: Int) -> Int:
    """Return the root of a node, halving the path on the way."""
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@kernel
def unite(parents: Array, a: Int, b: Int) -> None:
    """Join two components; the smaller root stays, so that roots do not depend on the order."""
    a, b = find(parents, a), find(parents, b)
    if a < b:
        parents[b] = a
    elif b < a:
        parents[a] = b


@kernel
def _equal_values(a: Array, b: Array) -> Int:
    """Count equal values (a loop without a way out, so that LLVM vectorises it)."""
    n = np.int32(0)
    for p in range(len(a)):
        n += np.int32(a[p] == b[p])
    return n


@kernel
def _first_common_band(a: Array, b: Array, n_rows: Int) -> Int:
    """Return the first band in which two signatures are equal (there is one)."""
    for band in range(len(a) // n_rows):
        same = True
        for p in range(band * n_rows, (band + 1) * n_rows):
            same &= a[p] == b[p]
        if same:
            return band
    return -1


@kernel
def _link(
    buckets: Array,
    nodes: Array,
    signatures: Array,
    n_rows: Int,
    near: Int,
    loose: Int,
    edges: Array,
    equal: Array,
) -> Int:
    """Find the links of whole buckets; return their number.

    A pair is written once, in the bucket of its first common band. A pair that earlier pairs of the
    bucket connect already is not looked at (near) or not written (loose), so a bucket of m members
    gives at most 2 (m - 1) links and the components are those of all pairs.
    """
    n, n_edges, start = len(buckets), 0, 0
    while start < n:
        end = start + 1
        while end < n and buckets[end] == buckets[start]:
            end += 1
        band = buckets[start] & 127
        by_near, by_loose = np.arange(end - start), np.arange(end - start)
        for i in range(1, end - start):
            for j in range(i):
                if find(by_near, i) == find(by_near, j):
                    continue
                a, b = signatures[start + i], signatures[start + j]
                n_equal = _equal_values(a, b)
                if n_equal < loose or (n_equal < near and find(by_loose, i) == find(by_loose, j)):
                    continue
                first = _first_common_band(a, b, n_rows)
                if first < 0 or first > band:
                    continue  # two bands fell into one bucket by a collision of their hashes
                unite(by_loose, i, j)
                if n_equal >= near:
                    unite(by_near, i, j)
                if first == band:
                    edges[n_edges, 0], edges[n_edges, 1] = nodes[start + j], nodes[start + i]
                    equal[n_edges] = n_equal
                    n_edges += 1
        start = end
    return n_edges


def link_buckets(
    buckets: np.ndarray,
    nodes: np.ndarray,
    signatures: np.ndarray,
    *,
    n_bands: int,
    near: float,
    loose: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Find similar pairs among the members of complete buckets.

    Every pair of a bucket is either compared or already connected, whatever the size of the bucket:
    none is lost to a cap. Time grows with the square of the number of dissimilar members.

    Args:
        buckets: int64 [n], the bucket of each member as :func:`band_keys` names it, equal ones
            adjacent.
        nodes: int64 [n], ascending inside a bucket.
        signatures: uint32 [n, n_permutations].
        n_bands: Bands of the signatures.
        near: Similarity from which a pair is a near-duplicate.
        loose: Similarity from which a pair belongs to the same cluster; at most ``near``.

    Returns:
        Pairs of nodes int64 [n_links, 2] (smaller first) and their similarities float64 [n_links].
    """
    n_permutations = signatures.shape[1]
    edges = np.empty((2 * len(buckets), 2), np.int64)
    equal = np.empty(2 * len(buckets), np.int64)
    n_edges = _link(
        fixed(buckets), fixed(nodes), fixed(signatures), n_permutations // n_bands,
        _at_least(near, n_permutations), _at_least(loose, n_permutations), edges, equal,
    )  # fmt: skip
    return edges[:n_edges], equal[:n_edges] / n_permutations


def _at_least(similarity: float, n_permutations: int) -> int:
    """Return the smallest number of equal values that reaches a similarity."""
    return int(np.ceil(similarity * n_permutations - 1e-9))


@kernel
def _components(n: Int, edges: Array) -> Array:
    parents = np.arange(n)
    for e in range(len(edges)):
        unite(parents, edges[e, 0], edges[e, 1])
    for node in range(n):
        parents[node] = find(parents, node)
    return parents


def components(n_nodes: int, edges: np.ndarray) -> np.ndarray:
    """Return the smallest node of each node's connected component: int64 [n_nodes].

    Args:
        n_nodes: Number of nodes; 8 bytes of memory each.
        edges: int64 [n_edges, 2].
    """
    return _components(n_nodes, fixed(edges))


@kernel
def _strongest(n: Int, edges: Array, similarities: Array) -> Array:
    best = np.zeros(n, np.float64)
    for e in range(len(edges)):
        for side in range(2):
            node = edges[e, side]
            best[node] = max(best[node], similarities[e])
    return best


def strongest_links(n_nodes: int, edges: np.ndarray, similarities: np.ndarray) -> np.ndarray:
    """Return the highest similarity among each node's links, 0 without links: float64 [n_nodes]."""
    return _strongest(n_nodes, fixed(edges), fixed(similarities))
