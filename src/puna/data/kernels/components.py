"""Similar pairs inside LSH buckets, and connected components by union-find."""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, fixed, kernel
from puna.data.kernels.jaccard import NO_SETS, Sets, similarity


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
def _compare(
    signatures: Array,
    values: Array,
    starts: Array,
    nodes: Array,
    i: Int,
    j: Int,
    limits: Array,
    band: Int,
    is_loose: bool,
) -> Array:
    """Return the similarity of two members and their first common band; -1 for "not here"."""
    n_rows, least, screen, n_near, _ = limits
    a, b = signatures[i], signatures[j]
    n_equal = _equal_values(a, b)
    if n_equal < least or (n_equal < screen and is_loose):
        return -1.0, -1
    first = _first_common_band(a, b, n_rows)
    if first < 0 or first > band:
        return -1.0, -1  # two bands fell into one bucket by a collision of their hashes
    if n_equal < screen or len(starts) < 2:
        return n_equal / len(a), first
    if first < band and n_equal < n_near:
        return -1.0, -1  # verified in that band's bucket; here it would hardly connect
    x, y = nodes[i], nodes[j]
    left, right = values[starts[x] : starts[x + 1]], values[starts[y] : starts[y + 1]]
    return similarity(left, right), first


@kernel
def _join(i: Int, c: Int, own: Int, first: Array, last: Array, after: Array) -> Int:
    """Let member ``i``, or its component ``own``, take in component ``c``; return its own."""
    if own < 0:
        after[last[c]] = i
        last[c] = i
        return c
    after[last[own]] = first[c]
    last[own] = last[c]
    return own


@kernel
def _link_bucket(
    start: Int,
    end: Int,
    buckets: Array,
    nodes: Array,
    signatures: Array,
    values: Array,
    starts: Array,
    limits: Array,
    floors: Array,
    edges: Array,
    found: Array,
    n_edges: Int,
) -> Int:
    """Write the links of one bucket behind the others; return the number of all.

    The near components are lists of members: ``first`` and ``last`` per component, ``after`` per
    member. A member is compared with those of a component until one is near.
    """
    near, loose = floors
    size, band, n_new = end - start, buckets[start] & 127, limits[4]
    first, last = np.empty(size, np.int64), np.empty(size, np.int64)
    after, by_loose = np.full(size, -1), np.arange(size)
    n_components = 0
    for i in range(size):
        own, c = -1, 0
        while c < n_components:
            j, likeness = first[c], -1.0
            while j >= 0 and likeness < near:
                is_known = nodes[start + i] >= n_new and nodes[start + j] >= n_new
                if not is_known:  # two of the index were compared when it was made
                    joined = find(by_loose, i) == find(by_loose, j)
                    likeness, common = _compare(
                        signatures, values, starts, nodes, start + i, start + j, limits, band,
                        joined,
                    )  # fmt: skip
                    if likeness >= near or (likeness >= loose and not joined):
                        unite(by_loose, i, j)
                        if common == band:
                            a, b = nodes[start + i], nodes[start + j]
                            edges[n_edges, 0], edges[n_edges, 1] = min(a, b), max(a, b)
                            found[n_edges] = likeness
                            n_edges += 1
                j = after[j]
            if likeness < near:
                c += 1
                continue
            joins_first = own < 0
            own = _join(i, c, own, first, last, after)
            if joins_first:
                c += 1
            else:  # the last component takes the place of the one that was taken in
                n_components -= 1
                first[c], last[c] = first[n_components], last[n_components]
        if own < 0:
            first[n_components] = last[n_components] = i
            n_components += 1
    return n_edges


@kernel
def _link(
    buckets: Array,
    nodes: Array,
    signatures: Array,
    values: Array,
    starts: Array,
    limits: Array,
    floors: Array,
    edges: Array,
    found: Array,
) -> Int:
    """Find the links of whole buckets; return their number.

    A pair is written once, in the bucket of its first common band. A pair that earlier pairs of the
    bucket connect already is not looked at (near) or not written (loose), so a bucket of m members
    gives at most 2 (m - 1) links and the components are those of all pairs.

    ``limits``: rows per band; equal values from which a pair is looked at, and from which it is
    verified; those that reach ``near``; first node of an index. ``floors``: similarities near and
    loose.
    """
    n, n_edges, start = len(buckets), 0, 0
    while start < n:
        end = start + 1
        while end < n and buckets[end] == buckets[start]:
            end += 1
        n_edges = _link_bucket(
            start, end, buckets, nodes, signatures, values, starts, limits, floors, edges, found,
            n_edges,
        )  # fmt: skip
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
    sets: Sets = NO_SETS,
    n_new: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find similar pairs among the members of complete buckets.

    Every pair of a bucket is either compared or already connected, whatever the size of the bucket:
    none is lost to a cap. Time grows with the square of the number of members that are not near to
    each other.

    With ``sets``, the estimate by signatures only chooses what is verified: a pair whose estimate
    is above ``near`` less :data:`SCREEN_SIGMAS` standard errors gets its exact Jaccard similarity;
    one below keeps the estimate and is loose at most.

    Args:
        buckets: int64 [n], the bucket of each member as :func:`band_keys` names it, equal ones
            adjacent.
        nodes: int64 [n], ascending inside a bucket.
        signatures: uint32 [n, n_permutations].
        n_bands: Bands of the signatures.
        near: Similarity from which a pair is a near-duplicate.
        loose: Similarity from which a pair belongs to the same cluster; at most ``near``.
        sets: The shingles of each node.
        n_new: Nodes from this one on are of an index; pairs of two of them are left out.

    Returns:
        Pairs of nodes int64 [n_links, 2] (smaller first) and their similarities float64 [n_links].
    """
    n_permutations = signatures.shape[1]
    n_near, n_loose = _at_least(near, n_permutations), _at_least(loose, n_permutations)
    error = np.sqrt(near * (1 - near) / n_permutations) if len(sets.starts) > 1 else 0.0
    screen = _at_least(near - SCREEN_SIGMAS * error, n_permutations)
    last = np.iinfo(np.int64).max if n_new is None else n_new
    limits = (n_permutations // n_bands, min(n_loose, screen), screen, n_near, last)
    edges = np.empty((2 * len(buckets), 2), np.int64)
    found = np.empty(2 * len(buckets), np.float64)
    n_edges = _link(
        fixed(buckets), fixed(nodes), fixed(signatures), fixed(sets.values), fixed(sets.starts),
        limits, (near - _ROUNDING, loose - _ROUNDING), edges, found,
    )  # fmt: skip
    return edges[:n_edges], found[:n_edges]


SCREEN_SIGMAS = 4.5
"""A pair at ``near`` itself misses the verification with a probability of 3e-6 (ours)."""

_ROUNDING = 1e-9


def _at_least(similarity: float, n_permutations: int) -> int:
    """Return the smallest number of equal values that reaches a similarity."""
    return int(np.ceil(similarity * n_permutations - _ROUNDING))


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
