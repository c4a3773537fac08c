"""Tables of short pieces and their ids: the tokens, and the pieces that were merged before.

Pieces of up to 7 bytes have rows of two words of 64 bits: the bytes with their number in the top
byte, and the ids. Those of 8 to 15 bytes have rows of four: bytes 0 to 7, bytes 8 to 14 with their
number in the top byte, the ids, and nothing. Small rows matter: the time goes into waiting for
memory. The word of ids holds their number in its two upper bits and up to two ids below; 3 there
says that the ids stand in a list, from the place in the lower 32 bits on, and how many above that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from puna.data.kernels.buffers import MIX, Array, kernel
from puna.tokens.kernels.bits import load64
from puna.tokens.kernels.scan import Word

SHORT_BYTES = 7
MEDIUM_BYTES = 15
WORD_BYTES = 8
MAX_LEARNT = 1 << 17
"""Pieces that are remembered beside the tokens."""
LENGTH_BITS = np.uint64(56)
COUNT_BITS = np.uint64(62)
ID_BITS = np.uint64(31)
ID_MASK = np.uint64((1 << 31) - 1)
LISTED = 3
"""Number of ids that stands for: they are in the list."""
HALF = np.uint64(32)
PLACE_MASK = np.uint64((1 << 32) - 1)
LIST_COUNT_MASK = np.uint64(0xFF)
_ONE = np.uint64(1)
_MIX_HIGH = np.uint64(0xC2B2AE3D27D4EB4F)


class Words(NamedTuple):
    """The tables.

    Attributes:
        short: uint64, rows of two, a power of two of them; the first word of a free one is 0.
        medium: uint64, rows of four; the second word of a free one is 0.
        ids: uint32, the list.
        used: int64, number of pieces learnt, and of ids in the list.
    """

    short: Any
    medium: Any
    ids: Any
    used: Any


@kernel
def short_key(data: Array, at: int, n: int) -> Word:
    """Return the key of a piece of 1 to 7 bytes; 8 bytes from ``at`` on must be readable."""
    mask = (_ONE << np.uint64(8 * n)) - _ONE
    return (load64(data, at) & mask) | (np.uint64(n) << LENGTH_BITS)


@kernel
def upper_key(data: Array, at: int, n: int) -> Word:
    """Return the second word of the key of a piece of 8 to 15 bytes; its first are 8 bytes."""
    mask = (_ONE << np.uint64(8 * (n - WORD_BYTES))) - _ONE
    return (load64(data, at + WORD_BYTES) & mask) | (np.uint64(n) << LENGTH_BITS)


@kernel
def slot_of(low: Word, high: Word) -> Word:
    """Return the place of a key in a table; its lower bits count, as many as there are rows."""
    return np.int64(((low ^ (high * _MIX_HIGH)) * MIX) >> HALF)


@kernel
def _short_row(data: Array, at: int, n: int, short: Array) -> int:
    """Return the row of a piece of 1 to 7 bytes, or the free one to take."""
    key = short_key(data, at, n)
    row = slot_of(key, np.uint64(0)) & (len(short) - 1)
    while short[row, 0] != 0 and short[row, 0] != key:
        row = (row + 1) & (len(short) - 1)
    short[row, 0] = key
    return row


@kernel
def _medium_row(data: Array, at: int, n: int, medium: Array) -> int:
    """Return the row of a piece of 8 to 15 bytes, or the free one to take."""
    low, high = load64(data, at), upper_key(data, at, n)
    row = slot_of(low, high) & (len(medium) - 1)
    while medium[row, 1] != 0 and (medium[row, 1] != high or medium[row, 0] != low):
        row = (row + 1) & (len(medium) - 1)
    medium[row, 0], medium[row, 1] = low, high
    return row


@kernel
def fill_words(arena: Array, starts: Array, short: Array, medium: Array) -> None:
    """Enter each token of up to 15 bytes; ``arena`` is padded."""
    for token in range(len(starts) - 1):
        n = starts[token + 1] - starts[token]
        ids = np.uint64(token) | (_ONE << COUNT_BITS)
        if n <= SHORT_BYTES:
            short[_short_row(arena, starts[token], n, short), 1] = ids
        elif n <= MEDIUM_BYTES:
            medium[_medium_row(arena, starts[token], n, medium), 2] = ids


@kernel
def learn_word(data: Array, start: int, n: int, words: Words, out: Array, n_out: int,
               n_ids: int) -> None:  # fmt: skip
    """Remember a piece of up to 15 bytes whose ids stand in ``out``, if there is room."""
    used, listed = words.used, words.ids
    place = used[1]
    if used[0] >= MAX_LEARNT or place + n_ids > len(listed):
        return
    if n_ids < LISTED:
        ids = np.uint64(out[n_out]) | (np.uint64(n_ids) << COUNT_BITS)
        if n_ids > 1:
            ids |= np.uint64(out[n_out + 1]) << ID_BITS
    else:
        for i in range(n_ids):
            listed[place + i] = out[n_out + i]
        used[1] += n_ids
        ids = np.uint64(place) | (np.uint64(n_ids) << HALF) | (np.uint64(LISTED) << COUNT_BITS)
    used[0] += 1
    if n <= SHORT_BYTES:
        short = words.short
        short[_short_row(data, start, n, short), 1] = ids
    else:
        medium = words.medium
        medium[_medium_row(data, start, n, medium), 2] = ids
