"""Encoding documents: pieces are cut, looked up, and merged when they are no tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from puna.data.kernels.buffers import Array, Int, kernel
from puna.tokens.kernels.bits import BLOCK, LANES, fetch, put_pair, range_mask, set_word, word_at
from puna.tokens.kernels.masks import NONE, cut
from puna.tokens.kernels.merge import SHORT_PIECE_BYTES, SHORT_PLACES, merge_long, merge_short
from puna.tokens.kernels.scan import part_end
from puna.tokens.kernels.words import (
    BELOW_TOP,
    HALF,
    KNOWN_BYTES,
    LISTED,
    LONG_BYTES,
    LOWER_HALF,
    ROW,
    TOP,
    Words,
    find_long,
    key_of,
    learn,
    row_of,
)
from puna.tokens.pretokens import MAX_CHARS, MAX_RUN_CHARS

NO_ID = -1
SLACK_IDS = 4
"""Ids that may be written behind the last one."""
_PIECES = 64
"""Pieces whose rows are fetched before the first of them is looked at."""
_SHORTEST_RUN = MAX_RUN_CHARS - 3 * BLOCK  # of whole blocks inside a run that is too long


class Tables(NamedTuple):
    """What is only read.

    Attributes:
        classes: Class of each code point; those beyond the table are OTHER.
        byte_ids: Id of each byte.
        pairs: Hash table of :func:`~puna.tokens.kernels.merge.fill_pairs`.
        sieve: Bits that tell what is not in it.
        byte_pairs: The same for each two bytes.
    """

    classes: Any
    byte_ids: Any
    pairs: Any
    sieve: Any
    byte_pairs: Any


class Scratch(NamedTuple):
    """What one call writes to.

    Attributes:
        ends: Ends of the pieces of a text.
        rows: uint64, of some pieces: the two words of the key, and where the row begins.
        keys: Of :func:`~puna.tokens.kernels.merge.merge_short`.
        chain: Of :func:`~puna.tokens.kernels.merge.merge_short`.
    """

    ends: Any
    rows: Any
    keys: Any
    chain: Any


@kernel
def _merge(data: Array, start: int, n: int, tables: Tables, scratch: Scratch, out: Array,
           n_out: Int) -> Int:  # fmt: skip
    # taken out once: numba counts references whenever an array comes out of a tuple
    byte_ids, pairs, sieve = tables.byte_ids, tables.pairs, tables.sieve
    if n <= SHORT_PIECE_BYTES:
        return merge_short(
            data, start, n, byte_ids, tables.byte_pairs, pairs, sieve, scratch.keys,
            scratch.chain, out, n_out,
        )  # fmt: skip
    ids = np.empty(n, np.int64)
    for i in range(n):
        ids[i] = byte_ids[data[start + i]]
    n_ids = merge_long(ids, n, pairs, sieve)
    for i in range(n_ids):
        out[n_out + i] = ids[i]
    return n_ids


@kernel
def _encode_new(data: Array, start: int, end: int, tables: Tables, words: Words,
                scratch: Scratch, out: Array, n_out: Int) -> Int:  # fmt: skip
    """Write the ids of a piece that the table of words does not have; return their number."""
    n = end - start
    if KNOWN_BYTES < n <= LONG_BYTES:
        long_rows, listed = words.long_rows, words.ids
        row, _ = find_long(data, start, n, long_rows, words.texts)
        where = long_rows[row, 2]
        n_ids, place = np.int64(where >> HALF), np.int64(where & LOWER_HALF)
        if n_ids:
            for i in range(n_ids):
                out[n_out + i] = listed[place + i]
            return n_ids
    n_ids = _merge(data, start, n, tables, scratch, out, n_out)
    if n <= LONG_BYTES:
        learn(data, start, n, words, out, n_out, n_ids)
    return n_ids


@kernel
def _find_rows(
    data: Array, start: int, ends: Array, piece: Int, stop: Int, rows: Array, keys: Array
) -> None:
    """Write key and row of the pieces from number ``piece`` to ``stop``, and fetch the rows.

    The rows come from memory while the keys of the next pieces are computed.
    """
    last_row = len(rows) - 1
    at = start + (np.int64(ends[piece - 1]) if piece else 0)
    for i in range(stop - piece):
        next_at = start + np.int64(ends[piece + i])
        low, high = key_of(data, at, next_at - at)
        place = ROW * (row_of(low, high) & last_row)
        fetch(rows, place)
        set_word(keys, 3 * i, low)
        set_word(keys, 3 * i + 1, high)
        set_word(keys, 3 * i + 2, np.uint64(place))
        at = next_at


@kernel
def _write_known(
    keys: Array, number: Int, stop: Int, rows: Array, listed: Array, out: Array, n_out: Int
) -> tuple[Int, Int]:
    """Write the ids of pieces from key ``number`` on, up to one that the table does not have.

    It calls nothing that takes arrays, and the table comes by itself: numba counts references when
    arrays are passed on or come out of a tuple, which would cost more than the search.

    Returns:
        The number of that key, or ``stop``, and the number of ids in ``out``.
    """
    last_place = ROW * len(rows) - 1
    while number < stop:
        low, high = word_at(keys, 3 * number), word_at(keys, 3 * number + 1)
        place = np.int64(word_at(keys, 3 * number + 2))
        found = word_at(rows, place + 1)
        while found != high or word_at(rows, place) != low:
            if found == NONE:
                return number, n_out
            place = (place + ROW) & last_place
            found = word_at(rows, place + 1)
        ids, more = word_at(rows, place + 2), word_at(rows, place + 3)
        # four are written whatever their number: that costs less than asking
        put_pair(out, n_out, ids)
        put_pair(out, n_out + 2, more & BELOW_TOP)
        n_ids = np.int64(more >> TOP)
        if n_ids == LISTED:
            first, n_ids = np.int64(ids & LOWER_HALF), np.int64(ids >> HALF)
            for i in range(n_ids):
                out[n_out + i] = listed[first + i]
        n_out += n_ids
        number += 1
    return number, n_out


@kernel
def _encode_part(data: Array, start: int, end: int, tables: Tables, words: Words,
                 scratch: Scratch, out: Array, n_out: Int) -> Int:  # fmt: skip
    """Write the ids of a text to ``out``; return the new number of ids."""
    ends, keys, rows, listed = scratch.ends, scratch.rows, words.rows, words.ids
    n_pieces = cut(data, start, end, tables.classes, ends)
    for piece in range(0, n_pieces, _PIECES):
        stop = min(_PIECES, n_pieces - piece)
        _find_rows(data, start, ends, piece, piece + stop, rows, keys)
        number, n_out = _write_known(keys, 0, stop, rows, listed, out, n_out)
        while number < stop:
            new = piece + number
            at = start + (np.int64(ends[new - 1]) if new else 0)
            next_at = start + np.int64(ends[new])
            n_out += _encode_new(data, at, next_at, tables, words, scratch, out, n_out)
            number, n_out = _write_known(keys, number + 1, stop, rows, listed, out, n_out)
    return n_out


@kernel
def _may_be_cut(data: Array, at: int, end: int) -> bool:
    """Tell whether a text may be one that ``split_huge`` cuts; false is certain."""
    if end - at > MAX_CHARS:
        return True
    n_blocks = 0
    while end - at >= BLOCK and n_blocks * BLOCK <= _SHORTEST_RUN:
        blank = range_mask(data, at, np.uint8(0), np.uint8(0x20), np.uint8(1))
        visible = range_mask(data, at, np.uint8(0), np.uint8(0x21), np.uint8(0x5E))
        n_blocks = 0 if blank != NONE and visible != NONE else n_blocks + 1
        at += BLOCK
    return n_blocks * BLOCK > _SHORTEST_RUN


@kernel
def encode_documents(data: Array, offsets: Array, bos: int, eos: int, tables: Tables, words: Words,
                     out: Array, lengths: Array) -> int:  # fmt: skip
    """Encode documents one after the other.

    Args:
        data: UTF-8 of all documents, padded (:func:`~puna.tokens.kernels.bits.padded`).
        offsets: Start of each document in ``data``, and the end of the last.
        bos: Id put before each document, or -1 for none.
        eos: Id put after each document, or -1 for none.
        tables: What is only read.
        words: Short pieces; learns those it meets.
        out: Receives the ids; room for every byte, two ids per document and :data:`SLACK_IDS`.
        lengths: Receives the number of ids of each document.

    Returns:
        Number of ids written.
    """
    longest = 0
    for document in range(len(offsets) - 1):
        longest = max(longest, offsets[document + 1] - offsets[document])
    scratch = Scratch(
        np.empty(longest, np.int32),
        np.empty((_PIECES, 3), np.uint64),
        np.empty(SHORT_PLACES + LANES, np.uint32),
        np.empty((SHORT_PLACES, 3), np.int64),
    )
    n_out = 0
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        first_out = n_out
        if bos >= 0:
            out[n_out] = bos
            n_out += 1
        if end - at > MAX_RUN_CHARS and _may_be_cut(data, at, end):
            chars_left = MAX_CHARS
            while at < end:
                stop, chars_left = part_end(data, at, end, tables.classes, chars_left)
                n_out = _encode_part(data, at, stop, tables, words, scratch, out, n_out)
                at = stop
        else:
            n_out = _encode_part(data, at, end, tables, words, scratch, out, n_out)
        if eos >= 0:
            out[n_out] = eos
            n_out += 1
        lengths[document] = n_out - first_out
    return n_out
