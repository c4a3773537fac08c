"""MinHash signatures (Broder 1997) of word 5-grams, and the buckets of locality-sensitive hashing.

Words are runs of ASCII letters, digits and ``_`` and of bytes above ASCII, letter case ignored;
punctuation separates, so the same words serve prose and code. In scripts without spaces between
words every character is a word. A text with fewer than five words has one shingle, all of it.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import (
    FNV_PRIME,
    FNV_SEED,
    MIX,
    Array,
    Int,
    Texts,
    kernel,
    longest_text,
)
from puna.data.kernels.chars import code_point, is_unspaced

N_PERMUTATIONS = 128
SHINGLE_WORDS = 5

BAND_BITS = 7
"""Low bits of a bucket's key that hold the number of its band."""

_MIX_2 = np.uint64(0xD6E8FEB86659FD93)


def permutations() -> tuple[np.ndarray, np.ndarray]:
    """Return multipliers (odd) and increments of the 128 fixed permutations of 32-bit hashes."""
    random = np.random.Generator(np.random.PCG64(20_240_418))
    multipliers = random.integers(0, 2**31, N_PERMUTATIONS, np.uint32) * np.uint32(2) + np.uint32(1)
    return multipliers, random.integers(0, 2**32, N_PERMUTATIONS, np.uint32)


@kernel
def _mix(value: Int) -> Int:
    value ^= value >> np.uint64(32)
    value *= MIX
    value ^= value >> np.uint64(29)
    value *= _MIX_2
    return value ^ (value >> np.uint64(32))


def _word_table() -> np.ndarray:
    """Byte -> itself in lower case inside words, 0 between words."""
    table = np.zeros(256, np.uint8)
    for byte in range(256):
        char = chr(byte)
        if byte >= 128 or char.isalnum() or char == "_":
            table[byte] = ord(char.lower()) if byte < 128 else byte
    return table


WORD_BYTE = _word_table()
"""Byte -> itself in lower case inside words, 0 between words."""


@kernel
def _split(data: Array, start: Int, end: Int, table: Array, hashes: Array) -> Int:
    """Hash the words of a text into ``hashes``; return their number."""
    n, i = 0, start
    value, inside = FNV_SEED, False
    while i < end:
        byte = table[data[i]]
        if byte == 0:
            if inside:
                hashes[n] = value
                n += 1
                value, inside = FNV_SEED, False
        elif byte >= 0xE0 and is_unspaced(code_point(data, i, end)):
            if inside:
                hashes[n] = value
                n += 1
            hashes[n] = (FNV_SEED ^ np.uint64(code_point(data, i, end))) * FNV_PRIME
            n += 1
            value, inside = FNV_SEED, False
            i += 3 if byte >= 0xF0 else 2
        else:
            value = (value ^ np.uint64(byte)) * FNV_PRIME
            inside = True
        i += 1
    if inside:
        hashes[n] = value
        n += 1
    return n


@kernel
def _shingle(hashes: Array, first: Int, last: Int) -> Int:
    """Combine the words ``first`` to ``last`` (exclusive) to a 32-bit hash."""
    value = FNV_SEED
    for k in range(first, last):
        value = (value ^ hashes[k]) * FNV_PRIME
        value ^= value >> np.uint64(31)
    return np.uint32(_mix(value) >> np.uint64(32))


@kernel
def _lower(signature: Array, a: Array, b: Array, h: Int) -> None:
    """Take the minimum with the 128 permuted values of one shingle (vectorised by LLVM)."""
    for p in range(N_PERMUTATIONS):
        value = np.uint32(a[p] * h + b[p])
        signature[p] = min(value, signature[p])


@kernel
def shingle_hashes(
    data: Array, start: Int, end: Int, table: Array, words: Array, out: Array
) -> Int:
    """Write the hashes of a text's shingles, in order and with repetition; return their number.

    Args:
        data: Bytes of all texts.
        start: First byte of the text.
        end: Byte after the last one.
        table: :data:`WORD_BYTE`.
        words: Working space, uint64, one more than the text's bytes.
        out: uint32, one more than the text's bytes.
    """
    n_words = _split(data, start, end, table, words)
    if n_words == 0:  # symbols only: all of them are the one shingle
        for i in range(start, end):
            words[i - start] = np.uint64(data[i])
        out[0] = _shingle(words, 0, end - start)
        return 1
    size = min(SHINGLE_WORDS, n_words)
    for k in range(n_words - size + 1):
        out[k] = _shingle(words, k, k + size)
    return n_words - size + 1


@kernel
def _sign(data: Array, offsets: Array, table: Array, a: Array, b: Array) -> Array:
    n = len(offsets) - 1
    longest = longest_text(offsets)
    words = np.empty(longest + 1, np.uint64)
    shingles = np.empty(longest + 1, np.uint32)
    signatures = np.empty((n, N_PERMUTATIONS), np.uint32)
    for d in range(n):
        signature = signatures[d]
        signature[:] = np.uint32(0xFFFFFFFF)
        n_found = shingle_hashes(data, offsets[d], offsets[d + 1], table, words, shingles)
        for k in range(n_found):
            _lower(signature, a, b, shingles[k])
    return signatures


@kernel
def _band_keys(signatures: Array, n_bands: Int) -> Array:
    n = len(signatures)
    n_rows = signatures.shape[1] // n_bands
    keys = np.empty((n, n_bands), np.int64)
    for d in range(n):
        for band in range(n_bands):
            value = FNV_SEED ^ np.uint64(band)
            for row in range(n_rows):
                value = (value ^ np.uint64(signatures[d, band * n_rows + row])) * FNV_PRIME
                value ^= value >> np.uint64(31)
            keys[d, band] = (np.int64(_mix(value)) << 7) | band
    return keys


def sign(texts: Texts) -> np.ndarray:
    """Return the MinHash signatures of texts: uint32 [n_texts, 128].

    The share of equal values of two signatures estimates the Jaccard similarity of the two sets of
    shingles with a standard error of at most 0.044.
    """
    return _sign(texts.data, texts.offsets, WORD_BYTE, *permutations())


def band_keys(signatures: np.ndarray, n_bands: int) -> np.ndarray:
    """Return the bucket of each band of each signature: int64 [n_texts, n_bands].

    The low :data:`BAND_BITS` bits are the number of the band, the others a hash of its values.
    """
    return _band_keys(signatures, n_bands)


@kernel
def _normalise(data: Array, offsets: Array, out: Array) -> Array:
    """Write each text with runs of white space as one space and ASCII letters in lower case."""
    n = len(offsets) - 1
    ends = np.zeros(n + 1, np.int64)
    size = 0
    for d in range(n):
        gap, first = False, size
        for i in range(offsets[d], offsets[d + 1]):
            byte = data[i]
            if byte <= 32:
                gap = size > first
                continue
            if gap:
                out[size] = 32
                size += 1
                gap = False
            out[size] = byte + 32 if 65 <= byte <= 90 else byte
            size += 1
        ends[d + 1] = size
    return ends


def normalised(texts: Texts) -> Texts:
    """Return the texts as exact deduplication compares them.

    Runs of white space and control bytes become one space, those at the ends are dropped, ASCII
    letters are in lower case.
    """
    out = np.empty(int(texts.offsets[-1] - texts.offsets[0]) + 1, np.uint8)
    ends = _normalise(texts.data, texts.offsets, out)
    return Texts(out, ends)
