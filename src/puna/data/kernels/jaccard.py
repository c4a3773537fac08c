"""Sets of word 5-grams as sorted hashes, and the Jaccard similarity of two of them.

A shingle is its 32-bit hash (the one that MinHash permutes), so a similarity is exact up to
collisions: two sets of ``n`` shingles that have nothing in common share ``n * n / 2**32`` by
chance, 0.02 of 10,000.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from puna.data.kernels.buffers import Array, Float, Int, Texts, fixed, kernel, longest_text
from puna.data.kernels.minhash import WORD_BYTE, shingle_hashes


class Sets(NamedTuple):
    """Sets of shingles: set ``i`` is ``values[starts[i]:starts[i + 1]]``, ascending and distinct.

    ``values`` (uint32) may be a memory map: sets are read one by one.
    """

    values: np.ndarray
    starts: np.ndarray


NO_SETS = Sets(np.empty(0, np.uint32), np.zeros(1, np.int64))
"""Nothing to verify with."""


@kernel
def _collect(data: Array, offsets: Array, wanted: Array, table: Array, out: Array) -> Array:
    n = len(offsets) - 1
    longest = longest_text(offsets)
    words = np.empty(longest + 1, np.uint64)
    shingles = np.empty(longest + 1, np.uint32)
    ends = np.zeros(n + 1, np.int64)
    size = 0
    for d in range(n):
        if wanted[d]:
            n_found = shingle_hashes(data, offsets[d], offsets[d + 1], table, words, shingles)
            found = shingles[:n_found]
            found.sort()
            for k in range(n_found):
                if k == 0 or found[k] != found[k - 1]:
                    out[size] = found[k]
                    size += 1
        ends[d + 1] = size
    return ends


def shingle_sets(texts: Texts, wanted: np.ndarray) -> Sets:
    """Return the set of shingles of each text.

    Args:
        texts: The texts.
        wanted: bool [n_texts]; the sets of the others are empty.
    """
    lengths = np.diff(texts.offsets)[wanted]
    out = np.empty(int(lengths.sum()) + len(lengths), np.uint32)
    ends = _collect(texts.data, texts.offsets, wanted, WORD_BYTE, out)
    return Sets(out[: ends[-1]], ends)


@kernel
def similarity(a: Array, b: Array) -> Float:
    """Return the Jaccard similarity of two ascending sets, 1 for two empty ones."""
    i, j, n_common = 0, 0, 0
    while i < len(a) and j < len(b):
        left, right = a[i], b[j]
        n_common += left == right
        i += left <= right
        j += right <= left
    n_all = len(a) + len(b) - n_common
    return n_common / n_all if n_all else 1.0


@kernel
def _similarities(pairs: Array, values: Array, starts: Array) -> Array:
    found = np.empty(len(pairs), np.float64)
    for p in range(len(pairs)):
        a, b = pairs[p, 0], pairs[p, 1]
        found[p] = similarity(values[starts[a] : starts[a + 1]], values[starts[b] : starts[b + 1]])
    return found


def similarities(pairs: np.ndarray, sets: Sets) -> np.ndarray:
    """Return the Jaccard similarity of pairs of sets: float64 [n_pairs].

    Args:
        pairs: int64 [n_pairs, 2], numbers of sets.
        sets: The sets.
    """
    return _similarities(fixed(pairs), fixed(sets.values), fixed(sets.starts))


@kernel
def _keepers(
    nodes: Array, groups: Array, values: Array, starts: Array, near: Float, n_new: Int,
    keepers: Array, found: Array,
) -> None:  # fmt: skip
    kept = np.empty(len(nodes), np.int64)
    n_kept = 0
    for i in range(len(nodes)):
        if i == 0 or groups[i] != groups[i - 1]:
            n_kept = 0
        node = nodes[i]
        keepers[i] = node
        if node < n_new:
            own = values[starts[node] : starts[node + 1]]
            for k in range(n_kept):
                likeness = similarity(own, values[starts[kept[k]] : starts[kept[k] + 1]])
                if likeness >= near:
                    keepers[i], found[i] = kept[k], likeness
                    break
        if keepers[i] == node:
            kept[n_kept] = node
            n_kept += 1


def direct_keepers(
    nodes: np.ndarray, groups: np.ndarray, sets: Sets, *, near: float, n_new: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose what is kept of groups, so that what is dropped is near to what it is dropped for.

    The members are looked at in their order: one goes if a member that is kept is near to it. Time
    grows with the number of members times those that are kept of their group.

    Args:
        nodes: int64 [n], the members of the groups, the better ones first.
        groups: int64 [n], equal ones adjacent.
        sets: The shingles of each node.
        near: Similarity from which one of two is enough.
        n_new: Nodes from this one on are kept in any case.

    Returns:
        For each member the node that is kept for it (itself, if kept), int64 [n], and the
        similarity of the two, float64 [n], 0 for what is kept.
    """
    keepers, found = np.empty(len(nodes), np.int64), np.zeros(len(nodes), np.float64)
    _keepers(
        fixed(nodes), fixed(groups), fixed(sets.values), fixed(sets.starts), near, n_new,
        keepers, found,
    )  # fmt: skip
    return keepers, found
