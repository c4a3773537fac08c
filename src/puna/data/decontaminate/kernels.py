"""N-grams of normalised words: an index of the examples, and a scan that finds them in texts.

Every n-gram of an example is a *key*; a short example (or field) is one key, found by its first
words. A key has one *posting* for each example it stands in. Where the hash of a text's n-gram is
in the index, the normalised words themselves are compared, so a hit never rests on a hash.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from puna.data.kernels.buffers import Array, Int, Texts, find_slot, kernel, power_of_two
from puna.data.kernels.normal_words import ASCII, LOWER, mixed, most_words, split_words

_BASE = np.uint64(0x9E3779B97F4A7C15)
_FILTER_BITS = 16
"""Bits of the filter per key, before the size is brought to a power of two."""


class Index(NamedTuple):
    """The keys of all examples.

    Attributes:
        words: uint8; the examples' normalised words, a space behind each.
        bounds: int64; word ``w`` of all examples is ``words[bounds[w]:bounds[w + 1]]``.
        example_words: int64 [n_examples + 1]; the words of example ``e`` are numbered from
            ``example_words[e]``.
        table: uint64, a power of two; hashes of keys.
        used: int64 of the same length; number of the key + 1, or 0.
        posting_bounds: int64 [n_keys + 1]; the postings of a key.
        postings: int64 [n_postings, 3]; example, number of the first word, number of words.
        filter: uint8, a power of two; bit field of the hashes, small enough for a cache.
        sizes: int64 [2]; words that are hashed of a whole n-gram and of a short example (0: there
            is no short one).
    """

    words: np.ndarray
    bounds: np.ndarray
    example_words: np.ndarray
    table: np.ndarray
    used: np.ndarray
    posting_bounds: np.ndarray
    postings: np.ndarray
    filter: np.ndarray
    sizes: np.ndarray


@kernel
def _power(n: Int) -> Int:
    value = np.uint64(1)
    for _ in range(n):
        value *= _BASE
    return value


@kernel
def _gram(hashes: Array, first: Int, n: Int) -> Int:
    value = np.uint64(0)
    for k in range(first, first + n):
        value = value * _BASE + hashes[k]
    return value


@kernel
def _key_of(gram: Int, n: Int) -> Int:
    """Hash of a gram in the index; grams of other lengths have other hashes."""
    return max(mixed(gram ^ (np.uint64(n) * _BASE)), np.uint64(1))


@kernel
def _split_all(data: Array, offsets: Array, ascii_table: Array, lower: Array) -> tuple[
    Array, Array, Array, Array
]:  # fmt: skip
    """Normalise texts end to end: words, bounds, hashes, words up to the end of each text."""
    n_bytes = offsets[-1] - offsets[0]
    most = n_bytes // 2 + 2 * len(offsets) + 2
    words, bounds = np.empty(2 * n_bytes + 2 * len(offsets), np.uint8), np.zeros(most + 1, np.int64)
    places, hashes = np.empty((most, 2), np.int64), np.empty(most, np.uint64)
    ends = np.zeros(len(offsets), np.int64)
    n, size = 0, 0
    for d in range(len(offsets) - 1):
        m = split_words(data, offsets[d], offsets[d + 1], ascii_table, lower, words[size:],
                        bounds[n:], places[n:], hashes[n:])  # fmt: skip
        for w in range(n, n + m + 1):
            bounds[w] += size
        n += m
        size = bounds[n]
        ends[d + 1] = n
    return words[:size], bounds[: n + 1], hashes[:n], ends


def split_all(texts: Texts) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Normalise texts: words, their bounds, their hashes, int64 [n_texts + 1] bounds of texts."""
    return _split_all(texts.data, texts.offsets, ASCII, LOWER)


@kernel
def _hash_grams(hashes: Array, firsts: Array, sizes: Array) -> Array:
    keys = np.empty(len(firsts), np.uint64)
    for i in range(len(firsts)):
        keys[i] = _key_of(_gram(hashes, firsts[i], sizes[i]), sizes[i])
    return keys


def hash_grams(hashes: np.ndarray, firsts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Hash grams given by their first words and numbers of words: uint64 per gram."""
    return _hash_grams(hashes, np.ascontiguousarray(firsts), np.ascontiguousarray(sizes))


@kernel
def _count_different(hashes: Array, firsts: Array, sizes: Array) -> Array:
    counts = np.zeros(len(firsts), np.int64)
    for i in range(len(firsts)):
        for k in range(sizes[i]):
            j = 0
            while hashes[firsts[i] + j] != hashes[firsts[i] + k]:
                j += 1
            counts[i] += j == k
    return counts


def count_different(hashes: np.ndarray, firsts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Count the different words of grams: int64 per gram."""
    return _count_different(hashes, np.ascontiguousarray(firsts), np.ascontiguousarray(sizes))


@kernel
def _fill(keys: Array, table: Array, used: Array, bits: Array) -> None:
    for i in range(len(keys)):
        slot = find_slot(table, used, len(table) - 1, keys[i])
        table[slot], used[slot] = keys[i], i + 1
        bit = np.int64(keys[i] >> np.uint64(20)) & (8 * len(bits) - 1)
        bits[bit >> 3] |= np.uint8(1 << (bit & 7))


def key_table(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make the hash table and the filter of different keys: ``table``, ``used``, ``filter``."""
    size = int(power_of_two(2 * len(keys) + 2))
    table, used = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    bits = np.zeros(int(power_of_two(_FILTER_BITS * len(keys) + 64)) // 8, np.uint8)
    _fill(keys, table, used, bits)
    return table, used, bits


@kernel
def _same(
    normal: Array, bounds: Array, w: Int, words: Array, word_bounds: Array, first: Int, n: Int
) -> bool:
    """Compare ``n`` words of a text, from word ``w``, with those of an example."""
    begin, other = bounds[w], word_bounds[first]
    n_bytes = bounds[w + n] - begin
    if word_bounds[first + n] - other != n_bytes:
        return False
    k = 0
    while k < n_bytes and normal[begin + k] == words[other + k]:
        k += 1
    return k == n_bytes


@kernel
def _grown(rows: Array, n: Int) -> Array:
    if n < len(rows):
        return rows
    larger = np.empty((2 * len(rows), rows.shape[1]), np.int64)
    larger[:n] = rows
    return larger


@kernel
def _scan(
    data: Array, offsets: Array, ascii_table: Array, lower: Array, words: Array,
    word_bounds: Array, table: Array, used: Array, posting_bounds: Array, postings: Array,
    bits: Array, sizes: Array,
) -> Array:  # fmt: skip
    longest = 0
    for d in range(len(offsets) - 1):
        longest = max(longest, offsets[d + 1] - offsets[d])
    most = most_words(longest)
    normal, bounds = np.empty(2 * longest + 2, np.uint8), np.empty(most + 1, np.int64)
    places, hashes = np.empty((most, 2), np.int64), np.empty(most, np.uint64)
    rows, n_rows = np.empty((64, 4), np.int64), 0
    mask, bit_mask = len(table) - 1, 8 * len(bits) - 1
    for d in range(len(offsets) - 1):
        n = split_words(data, offsets[d], offsets[d + 1], ascii_table, lower, normal, bounds,
                        places, hashes)  # fmt: skip
        for s in range(2):
            size = sizes[s]
            if size == 0 or n < size:
                continue
            drop = _power(size)
            gram = _gram(hashes, 0, size - 1)
            for w in range(n - size + 1):
                gram = gram * _BASE + hashes[w + size - 1]
                if w:
                    gram -= drop * hashes[w - 1]
                key = _key_of(gram, size)
                bit = np.int64(key >> np.uint64(20)) & bit_mask
                if not bits[bit >> 3] & (1 << (bit & 7)):
                    continue
                slot = find_slot(table, used, mask, key)
                if used[slot] == 0:
                    continue
                for p in range(posting_bounds[used[slot] - 1], posting_bounds[used[slot]]):
                    length = postings[p, 2]
                    if w + length <= n and _same(
                        normal, bounds, w, words, word_bounds, postings[p, 1], length
                    ):
                        rows = _grown(rows, n_rows)
                        rows[n_rows, 0], rows[n_rows, 1] = d, p
                        rows[n_rows, 2] = places[w, 0] - offsets[d]
                        rows[n_rows, 3] = places[w + length - 1, 1] - offsets[d]
                        n_rows += 1
    return rows[:n_rows]


def find_examples(texts: Texts, index: Index) -> np.ndarray:
    """Find the keys of the index in texts.

    Returns:
        int64 [n_hits, 4]: text, posting, and the bytes of the text where the words begin and end.
    """
    return _scan(
        texts.data, texts.offsets, ASCII, LOWER, index.words, index.bounds, index.table, index.used,
        index.posting_bounds, index.postings, index.filter, index.sizes,
    )  # fmt: skip
