"""Token distributions: counts of words hashed to buckets, and how far a document is from them.

The divergence of a document with counts c and n words from the corpus distribution q is
KL(p || q) = sum p log(p / q) in nats, with p = (c + a q) / (n + a): a prior of ``a`` words of the
corpus, so that a short document is no outlier for having few different words.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, kernel
from puna.data.kernels.normal_words import ASCII, LOWER, most_words, split_words

N_BUCKETS = 1 << 16
"""Words are hashed to this many tokens."""

_UNSEEN = 1e-3
"""Count of a token that was never seen."""


@kernel
def _longest(offsets: Array) -> Int:
    longest = 0
    for d in range(len(offsets) - 1):
        longest = max(longest, offsets[d + 1] - offsets[d])
    return longest


@kernel
def _count(
    data: Array, offsets: Array, groups: Array, n_groups: Int, ascii_table: Array, lower: Array
) -> Array:
    longest = _longest(offsets)
    most = most_words(longest)
    normal = np.empty(2 * longest + 2, np.uint8)
    bounds, places = np.empty(most + 1, np.int64), np.empty((most, 2), np.int64)
    hashes = np.empty(most, np.uint64)
    counts = np.zeros((n_groups, N_BUCKETS), np.int64)
    for d in range(len(offsets) - 1):
        if groups[d] < 0:
            continue
        n = split_words(data, offsets[d], offsets[d + 1], ascii_table, lower, normal, bounds,
                        places, hashes)  # fmt: skip
        for w in range(n):
            counts[groups[d], np.int64(hashes[w] & np.uint64(N_BUCKETS - 1))] += 1
    return counts


def count_tokens(texts: Texts, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """Count the tokens of groups of texts: int64 [n_groups, N_BUCKETS].

    Args:
        texts: The batch.
        groups: int64 per text, below ``n_groups``; negative leaves the text out.
        n_groups: Number of groups.
    """
    return _count(texts.data, texts.offsets, groups, n_groups, ASCII, LOWER)


@kernel
def _diverge(
    data: Array, offsets: Array, groups: Array, log_q: Array, prior: Int, ascii_table: Array,
    lower: Array,
) -> tuple[Array, Array]:  # fmt: skip
    n_docs, longest = len(offsets) - 1, _longest(offsets)
    most = most_words(longest)
    normal = np.empty(2 * longest + 2, np.uint8)
    bounds, places = np.empty(most + 1, np.int64), np.empty((most, 2), np.int64)
    hashes = np.empty(most, np.uint64)
    counts, seen = np.zeros(N_BUCKETS, np.int64), np.empty(N_BUCKETS, np.int64)
    nats, words = np.zeros(n_docs, np.float64), np.zeros(n_docs, np.int64)
    for d in range(n_docs):
        if groups[d] < 0:
            continue
        n = split_words(data, offsets[d], offsets[d + 1], ascii_table, lower, normal, bounds,
                        places, hashes)  # fmt: skip
        n_seen = 0
        for w in range(n):
            token = np.int64(hashes[w] & np.uint64(N_BUCKETS - 1))
            if counts[token] == 0:
                seen[n_seen] = token
                n_seen += 1
            counts[token] += 1
        total, rest = 0.0, 1.0
        for s in range(n_seen):
            log_here = log_q[groups[d], seen[s]]
            q = np.exp(log_here)
            p = (counts[seen[s]] + prior * q) / (n + prior)
            total += p * (np.log(p) - log_here)
            rest -= q
            counts[seen[s]] = 0
        if prior:
            share = prior / (n + prior)
            total += share * np.log(share) * max(rest, 0.0)
        nats[d], words[d] = total, n
    return nats, words


def divergence(
    texts: Texts, groups: np.ndarray, log_q: np.ndarray, prior_words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each text's divergence in nats (float64) and its number of words (int64).

    Args:
        texts: The batch.
        groups: int64 per text; negative leaves the text out (0 nats, 0 words).
        log_q: float64 [n_groups, N_BUCKETS]; logarithm of each group's distribution.
        prior_words: Words of the corpus that are added to each document.
    """
    return _diverge(texts.data, texts.offsets, groups, log_q, prior_words, ASCII, LOWER)


def log_distribution(counts: np.ndarray) -> np.ndarray:
    """Return the logarithm of the distribution of counts.

    Every token of a document is in the counts of its source, so next to no smoothing is needed; one
    that weighs in a small source (65,536 words more) would make all its documents outliers.
    """
    smooth = counts.astype(np.float64) + _UNSEEN
    return np.log(smooth) - np.log(smooth.sum(-1, keepdims=True))
