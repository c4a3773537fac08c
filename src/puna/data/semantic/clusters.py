"""Spherical k-means over embeddings of small integers, equal to the bit on every machine.

Embeddings are quantised to integers (at most 127 in size, less above 1,040 dimensions) so that a
product of two has no rounding even in float32, whatever the order of its sums: a matrix product
gives the same numbers for any number of threads and any BLAS. Centroids are sums of members in
64-bit integers, quantised in the same way, so an iteration does not depend on an order either.

Spherical k-means: Dhillon & Modha 2001, "Concept decompositions for large sparse text data".
"""

from __future__ import annotations

import math

import numpy as np

_EXACT = 2**24 - 1
"""Largest integer up to which float32 holds every integer."""
BLOCK = 4096
"""Rows of a block of a matrix product."""
_SEED_STREAM = 0x5E3D


def largest_step(dim: int) -> int:
    """Return the largest integer of a quantised embedding: dim * its square stays exact."""
    return min(127, math.isqrt(_EXACT // dim))


def quantise(vectors: np.ndarray) -> np.ndarray:
    """Round each vector to integers, its largest value to the largest step: int8 [n, dim].

    The cosine of two vectors changes by about 0.001 (rows of zeros stay).
    """
    largest = np.abs(vectors).max(1, keepdims=True, initial=0.0)
    scale = np.divide(
        largest_step(vectors.shape[1]), largest, out=np.zeros_like(largest), where=largest > 0
    )
    return np.rint(vectors * scale).astype(np.int8)


def squares_of(vectors: np.ndarray) -> np.ndarray:
    """Return the squared lengths of quantised vectors, 1 for a row of zeros: float64 [n]."""
    wide = vectors.astype(np.float32)
    squares = np.einsum("nd,nd->n", wide, wide)
    return np.where(squares > 0, squares, 1).astype(np.float64)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of every row of one block with every row of another: float64 [n, m].

    It is 1 exactly for equal rows: the product of two squares is exact, and so is its root.
    """
    products = a.astype(np.float32) @ b.astype(np.float32).T
    return products / np.sqrt(squares_of(a)[:, None] * squares_of(b)[None, :])


def nearest(vectors: np.ndarray, centroids: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest centroids of each vector, the nearest first, and their cosines.

    Equal cosines: the smaller number first.

    Args:
        vectors: int8 [n_vectors, dim].
        centroids: int8 [n_centroids, dim].
        n: How many; at most ``n_centroids``.

    Returns:
        int32 [n_vectors, n] and float64 [n_vectors, n].
    """
    chosen = np.empty((len(vectors), n), np.int32)
    found = np.empty((len(vectors), n), np.float64)
    if n == 0:
        return chosen, found
    for start in range(0, len(vectors), BLOCK):
        likeness = cosines(vectors[start : start + BLOCK], centroids)
        rows = np.arange(len(likeness))
        for rank in range(n):
            best = likeness.argmax(1)
            chosen[start : start + BLOCK, rank] = best
            found[start : start + BLOCK, rank] = likeness[rows, best]
            likeness[rows, best] = -np.inf
    return chosen, found


def k_means(sample: np.ndarray, n_clusters: int, *, seed: int, n_iterations: int) -> np.ndarray:
    """Find centroids: int8 [at most n_clusters, dim], of which no two are equal.

    It starts from vectors of the sample by chance; a cluster without members takes the vector that
    is least like its own centroid.

    Args:
        sample: int8 [n, dim], no row of zeros.
        n_clusters: At least 1.
        seed: Of the start.
        n_iterations: Of Lloyd's algorithm, fewer when nothing changes.
    """
    distinct = np.unique(sample, axis=0)
    rng = np.random.Generator(np.random.PCG64([_SEED_STREAM, seed]))
    n_clusters = min(n_clusters, len(distinct))
    centroids = distinct[np.sort(rng.choice(len(distinct), n_clusters, replace=False))]
    for _ in range(n_iterations):
        labels, found = nearest(sample, centroids, 1)
        moved = _means(sample, labels[:, 0], found[:, 0], centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return np.unique(centroids, axis=0)


def _means(
    sample: np.ndarray, labels: np.ndarray, found: np.ndarray, centroids: np.ndarray
) -> np.ndarray:
    n_clusters, dim = centroids.shape
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    sums = np.zeros((n_clusters, dim), np.int64)
    # Members are scaled to one length first (in 16 bits), so that each counts the same.
    unit = np.rint(sample[order] * (32767 / np.sqrt(squares_of(sample[order])))[:, None]).astype(
        np.int64
    )
    sums[present] = np.add.reduceat(unit, starts, axis=0)
    moved = quantise(sums.astype(np.float64))
    empty = np.flatnonzero(np.bincount(labels, minlength=n_clusters) == 0)
    lone = np.argsort(found, kind="stable")[: len(empty)]
    moved[empty] = sample[lone]
    return moved
