"""Tables of pieces and their ids: the tokens, and the pieces that were merged before.

Pieces of up to 15 bytes have rows of four words of 64 bits, two rows to a line of the cache: bytes
0 to 7; bytes 8 to 14 with the number of bytes on top; ids 0 and 1; ids 2 and 3 with the number of
ids on top. A piece of more than four ids has :data:`LISTED` there, and in its third word the place
of its ids in a list, with their number above. Pieces of up to 254 bytes have rows in a second
table: a hash; the place of their bytes in a list, with the number above; the place of their ids,
with the number above; nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from puna.data.kernels.buffers import MIX, Array, kernel
from puna.tokens.kernels.bits import lines_of, load64
from puna.tokens.kernels.scan import Word

KNOWN_BYTES = 15
"""Longest piece of the first table."""
LONG_BYTES = 254
"""Longest piece of the second table."""
ROW = 4
"""Words of a row."""
MAX_LEARNT = 3 << 16
"""Pieces that the first table remembers beside the tokens."""
MAX_LEARNT_LONG = 1 << 16
"""Pieces that the second table remembers beside the tokens."""
LISTED = 0xFF
"""Number of ids that stands for: they are in the list."""
TOP = np.uint64(56)
"""Place of the numbers of bytes and of ids."""
BELOW_TOP = np.uint64((1 << 56) - 1)
HALF = np.uint64(32)
LOWER_HALF = np.uint64((1 << 32) - 1)
_INLINE_IDS = 4
_BYTES_PER_LONG = 48
_IDS_PER_LEARNT = 6
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_ONE = np.uint64(1)
_MIX_HIGH = np.uint64(0xC2B2AE3D27D4EB4F)


class Words(NamedTuple):
    """The tables.

    Attributes:
        rows: uint64, rows of four, a power of two of them; the second word of a free one is 0.
        long_rows: uint64, rows of four, a power of two; the third word of a free one is 0.
        texts: uint8, the bytes of long pieces.
        ids: uint32, the ids that are not in rows.
        left: int64, room that is left: rows, long rows, bytes of texts, and ids.
    """

    rows: Any
    long_rows: Any
    texts: Any
    ids: Any
    left: Any


def new_words(n_bytes: Sequence[int]) -> Words:
    """Return tables without words, with room for tokens of these lengths and for what is learnt."""
    n_known = MAX_LEARNT + sum(n <= KNOWN_BYTES for n in n_bytes)
    long = [n for n in n_bytes if KNOWN_BYTES < n <= LONG_BYTES]
    n_long = MAX_LEARNT_LONG + len(long)
    texts = np.zeros(sum(long) + _BYTES_PER_LONG * MAX_LEARNT_LONG, np.uint8)
    ids = np.zeros(len(long) + _IDS_PER_LEARNT * MAX_LEARNT, np.uint32)
    left = np.array([n_known, n_long, len(texts) - 8, len(ids)], np.int64)
    rows, long_rows = (lines_of(ROW * table_size(n), 0).reshape(-1, ROW) for n in (n_known, n_long))
    return Words(rows, long_rows, texts, ids, left)


def table_size(n_entries: int) -> int:
    """Return a power of two, of which the entries fill two thirds at most."""
    return 1 << max(4, (3 * n_entries // 2).bit_length())


def copy_words(words: Words) -> Words:
    """Return a copy of the tables."""
    rows, long_rows = (lines_of(rows.size, 0).reshape(-1, ROW) for rows in words[:2])
    rows[:], long_rows[:] = words.rows, words.long_rows
    return Words(rows, long_rows, *(table.copy() for table in words[2:]))


@kernel
def key_of(data: Array, at: int, n: int) -> tuple[Word, Word]:
    """Return the two words of the key of a piece, without a branch.

    A piece of more than 15 bytes has a key that no row has. 16 bytes must be readable.
    """
    n_low, n = min(n, 8), min(n, KNOWN_BYTES + 1)
    low = load64(data, at) & (_ALL >> np.uint64(64 - 8 * n_low))
    n_bits = np.uint64(8 * (n - n_low) & 63)
    high = load64(data, at + 8) & ((_ONE << n_bits) - _ONE)
    return low, high | (np.uint64(n) << TOP)


@kernel
def row_of(low: Word, high: Word) -> Word:
    """Return the row of a key; the lower bits count, as many as the number of rows has."""
    return np.int64(((low ^ (high * _MIX_HIGH)) * MIX) >> HALF)


@kernel
def _take_row(data: Array, at: int, n: int, rows: Array) -> int:
    """Return the row of a piece, or the free one, which becomes its own."""
    low, high = key_of(data, at, n)
    row = row_of(low, high) & (len(rows) - 1)
    while rows[row, 1] != 0 and (rows[row, 1] != high or rows[row, 0] != low):
        row = (row + 1) & (len(rows) - 1)
    rows[row, 0], rows[row, 1] = low, high
    return row


@kernel
def _same_bytes(left: Array, left_start: int, right: Array, right_start: int, n: int) -> bool:
    """Tell whether ``n`` bytes, at least 8, are equal."""
    for at in range(0, n - 8, 8):
        if load64(left, left_start + at) != load64(right, right_start + at):
            return False
    return load64(left, left_start + n - 8) == load64(right, right_start + n - 8)


@kernel
def _digest(data: Array, start: int, n: int) -> Word:
    """Return a hash of at least 8 bytes."""
    value = np.uint64(n)
    for at in range(start, start + n - 8, 8):
        value = (value ^ load64(data, at)) * MIX
        value ^= value >> HALF
    value = (value ^ load64(data, start + n - 8)) * MIX
    return value ^ (value >> HALF)


@kernel
def find_long(data: Array, start: int, n: int, long_rows: Array, texts: Array) -> tuple[Word, Word]:
    """Return the row of a piece of 16 to 254 bytes, or the free one to take, and its hash."""
    digest = _digest(data, start, n)
    row = np.int64(digest) & (len(long_rows) - 1)
    while long_rows[row, 2] != 0:
        place = long_rows[row, 1]
        if (
            long_rows[row, 0] == digest
            and np.int64(place >> HALF) == n
            and _same_bytes(texts, np.int64(place & LOWER_HALF), data, start, n)
        ):
            break
        row = (row + 1) & (len(long_rows) - 1)
    return row, digest


@kernel
def learn(data: Array, start: int, n: int, words: Words, out: Array, n_out: int,
          n_ids: int) -> None:  # fmt: skip
    """Remember a piece of up to 254 bytes whose ids stand in ``out``, if there is room."""
    left, listed = words.left, words.ids
    is_long = np.int64(n > KNOWN_BYTES)
    if left[is_long] == 0 or left[2] < n or left[3] < n_ids:
        return
    left[is_long] -= 1
    place = len(listed) - left[3]
    where = np.uint64(place) | (np.uint64(n_ids) << HALF)
    if is_long or n_ids > _INLINE_IDS:
        left[3] -= n_ids
        for i in range(n_ids):
            listed[place + i] = out[n_out + i]
    if is_long:
        long_rows, texts = words.long_rows, words.texts
        row, digest = find_long(data, start, n, long_rows, texts)
        first = len(texts) - 8 - left[2]
        left[2] -= n
        for i in range(n):
            texts[first + i] = data[start + i]
        long_rows[row, 0], long_rows[row, 2] = digest, where
        long_rows[row, 1] = np.uint64(first) | (np.uint64(n) << HALF)
        return
    rows = words.rows
    row = _take_row(data, start, n, rows)
    rows[row, 2], rows[row, 3] = where, np.uint64(LISTED) << TOP
    if n_ids <= _INLINE_IDS:
        rows[row, 2], rows[row, 3] = out[n_out], np.uint64(n_ids) << TOP
        if n_ids > 1:
            rows[row, 2] |= np.uint64(out[n_out + 1]) << HALF
        if n_ids > 2:
            rows[row, 3] |= np.uint64(out[n_out + 2])
        if n_ids > 3:
            rows[row, 3] |= np.uint64(out[n_out + 3]) << HALF


@kernel
def learn_tokens(arena: Array, starts: Array, words: Words) -> None:
    """Enter each token of up to 254 bytes; ``arena`` is padded."""
    ids = np.empty(1, np.uint32)
    for token in range(len(starts) - 1):
        n = starts[token + 1] - starts[token]
        ids[0] = token
        if n <= LONG_BYTES:
            learn(arena, starts[token], n, words, ids, 0, 1)
