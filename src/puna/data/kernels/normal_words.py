"""Words as contamination and token distributions compare them, with their places in the text.

A word is a maximal run of letters and digits in lower case; white space, punctuation and symbols
separate words and are dropped. In scripts without spaces every code point is a word.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import (
    FNV_PRIME,
    FNV_SEED,
    MIX,
    Array,
    Int,
    fixed,
    kernel,
)
from puna.data.kernels.chars import code_point, is_unspaced, wide_class

_LOWER_POINTS = 0x2000
"""Code points up to Greek Extended have their lower case in a table; above it case is kept."""


def _ascii_table() -> np.ndarray:
    table = np.zeros(256, np.uint8)
    for byte in range(128):
        if chr(byte).isalnum():
            table[byte] = ord(chr(byte).lower())
    table[128:] = 1  # part of a longer code point
    return table


def _lower_table() -> np.ndarray:
    """Lower case of code points that keep their UTF-8 length, so that buffers have a bound."""
    table = np.arange(_LOWER_POINTS, dtype=np.int64)
    for point in range(_LOWER_POINTS):
        lower = chr(point).lower()
        if len(lower) == 1 and len(lower.encode()) == len(chr(point).encode()):
            table[point] = ord(lower)
    return table


ASCII = fixed(_ascii_table())
"""uint8 [256]: 0 separates words, 1 is a byte of a longer code point, else the lower case."""

_SEPARATOR, _LETTER, _WORD = 0, 1, 2

LOWER = fixed(_lower_table())
"""int64: code point -> its lower case."""


@kernel
def mixed(value: Int) -> Int:
    """Spread the bits of a uint64 over all of it."""
    value ^= value >> np.uint64(32)
    value *= MIX
    return value ^ (value >> np.uint64(29))


@kernel
def most_words(n_bytes: Int) -> Int:
    """Return the most words that a text of so many bytes can have."""
    return n_bytes // 2 + 2


@kernel
def _end_word(
    n: Int, size: Int, value: Int, end: Int, normal: Array, bounds: Array, places: Array,
    hashes: Array,
) -> tuple[Int, Int]:  # fmt: skip
    """Close word ``n``; return the number of words and the bytes written."""
    normal[size] = 32
    size += 1
    hashes[n] = mixed(value)
    places[n, 1] = end
    bounds[n + 1] = size
    return n + 1, size


@kernel
def _write_point(
    data: Array, i: Int, n_bytes: Int, point: Int, lower: Array, normal: Array, size: Int
) -> Int:
    """Write a code point above ASCII in lower case; return it."""
    if point >= len(lower) or lower[point] == point or n_bytes < 2:
        for k in range(n_bytes):
            normal[size + k] = data[i + k]
        return point
    point = lower[point]
    if n_bytes == 2:
        normal[size] = 0xC0 | (point >> 6)
    else:
        normal[size] = 0xE0 | (point >> 12)
        normal[size + 1] = 0x80 | ((point >> 6) & 0x3F)
    normal[size + n_bytes - 1] = 0x80 | (point & 0x3F)
    return point


@kernel
def split_words(
    data: Array,
    start: Int,
    end: Int,
    ascii_table: Array,
    lower: Array,
    normal: Array,
    bounds: Array,
    places: Array,
    hashes: Array,
) -> Int:
    """Split a text into normalised words.

    Args:
        data: UTF-8.
        start: First byte of the text.
        end: Behind its last byte.
        ascii_table: :data:`ASCII`.
        lower: :data:`LOWER`.
        normal: Becomes the words, a space behind each; at least 2 * bytes + 2.
        bounds: ``normal[bounds[w]:bounds[w + 1]]`` becomes word ``w`` with its space; one more than
            :func:`most_words`.
        places: int64 [most_words, 2]; becomes the bytes of ``data`` where a word begins and ends.
        hashes: Becomes a uint64 per word.

    Returns:
        The number of words.
    """
    n, size, i = 0, 0, start
    value, inside = FNV_SEED, False
    bounds[0] = 0
    while i < end:
        byte = ascii_table[data[i]]
        kind, n_bytes, point = _SEPARATOR, 1, np.int64(byte)
        if byte > 1:
            kind = _LETTER
        elif byte == 1:
            point = code_point(data, i, end)
            n_bytes = min(2 + (data[i] >= 0xE0) + (data[i] >= 0xF0), end - i)
            if wide_class(point) == 1:
                kind = _WORD if is_unspaced(point) else _LETTER
        if inside and kind != _LETTER:
            n, size = _end_word(n, size, value, i, normal, bounds, places, hashes)
            inside = False
        if kind != _SEPARATOR:
            if not inside:
                places[n, 0] = i
                value, inside = FNV_SEED, True
            if byte == 1:
                point = _write_point(data, i, n_bytes, point, lower, normal, size)
            else:
                normal[size] = byte
            value = (value ^ np.uint64(point)) * FNV_PRIME
            size += n_bytes
        i += n_bytes
        if kind == _WORD:
            n, size = _end_word(n, size, value, i, normal, bounds, places, hashes)
            inside = False
    if inside:
        n, size = _end_word(n, size, value, end, normal, bounds, places, hashes)
    return n
