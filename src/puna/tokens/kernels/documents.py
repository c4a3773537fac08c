"""Encoding documents: pieces are cut, looked up, and merged when they are no tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from puna.data.kernels.buffers import Array, Int, kernel
from puna.tokens.kernels.bits import BLOCK, load64, put, range_mask, word_at
from puna.tokens.kernels.masks import NONE, cut
from puna.tokens.kernels.merge import (
    NO_ID,
    SHORT_PIECE_BYTES,
    find_token,
    hash_bytes,
    merge_long,
    merge_short,
    same_bytes,
)
from puna.tokens.kernels.scan import part_end
from puna.tokens.kernels.words import (
    COUNT_BITS,
    HALF,
    ID_BITS,
    ID_MASK,
    LIST_COUNT_MASK,
    LISTED,
    MEDIUM_BYTES,
    PLACE_MASK,
    SHORT_BYTES,
    Words,
    learn_word,
    short_key,
    slot_of,
    upper_key,
)  # fmt: skip
from puna.tokens.pretokens import MAX_CHARS, MAX_RUN_CHARS

SLACK_IDS = 4
"""Ids that may be written behind the last one."""
_MAX_SEEN = 1 << 16
_SHORTEST_RUN = MAX_RUN_CHARS - 3 * BLOCK  # of whole blocks inside a run that is too long


class Tables(NamedTuple):
    """What is only read.

    Attributes:
        classes: Class of each code point; those beyond the table are OTHER.
        byte_ids: Id of each byte.
        long_ids: Ids of the tokens of more than 15 bytes.
        arena: Their bytes.
        starts: Start of each in ``arena``.
        slots: Hash table of :func:`~puna.tokens.kernels.merge.fill_vocabulary`.
        pairs: Hash table of :func:`~puna.tokens.kernels.merge.fill_pairs`.
        byte_pairs: The same for each two bytes.
    """

    classes: Any
    byte_ids: Any
    long_ids: Any
    arena: Any
    starts: Any
    slots: Any
    pairs: Any
    byte_pairs: Any


class Scratch(NamedTuple):
    """What one call writes to.

    Attributes:
        ends: Ends of the pieces of a text.
        seen: Long pieces that took merging: start, length, first id in ``out``, number of ids.
        ids: Of a short piece.
        ranks: Of a short piece.
    """

    ends: Any
    seen: Any
    ids: Any
    ranks: Any


@kernel
def _merge(data: Array, start: int, n: int, tables: Tables, scratch: Scratch, out: Array,
           n_out: Int) -> Int:  # fmt: skip
    # taken out once: numba counts references whenever an array comes out of a tuple
    byte_ids, byte_pairs, pairs = tables.byte_ids, tables.byte_pairs, tables.pairs
    ids = scratch.ids if n <= SHORT_PIECE_BYTES else np.empty(n, np.int64)
    for i in range(n):
        ids[i] = byte_ids[data[start + i]]
    if n <= SHORT_PIECE_BYTES:
        ranks = scratch.ranks
        for i in range(n - 1):
            ranks[i] = byte_pairs[256 * np.int64(data[start + i]) + data[start + i + 1]]
        n_ids = merge_short(ids, ranks, n, pairs)
    else:
        n_ids = merge_long(ids, n, pairs)
    for i in range(n_ids):
        out[n_out + i] = ids[i]
    return n_ids


@kernel
def _encode_long(data: Array, start: int, end: int, tables: Tables, scratch: Scratch, out: Array,
                 n_out: Int) -> Int:  # fmt: skip
    """Write the ids of a long piece to ``out``; return their number.

    A piece that was met before in this call is copied from where its ids stand in ``out``.
    """
    n = end - start
    digest = hash_bytes(data, start, end)
    whole = find_token(digest, data, start, end, tables.arena, tables.starts, tables.slots)
    if whole != NO_ID:
        out[n_out] = tables.long_ids[whole]
        return 1
    seen = scratch.seen
    slot = seen[np.int64(digest & np.uint64(len(seen) - 1))]
    if slot[1] == n and same_bytes(data, slot[0], data, start, n):
        for i in range(slot[3]):
            out[n_out + i] = out[slot[2] + i]
        return slot[3]
    n_ids = _merge(data, start, n, tables, scratch, out, n_out)
    slot[0], slot[1], slot[2], slot[3] = start, n, n_out, n_ids
    return n_ids


@kernel
def _encode_new(data: Array, start: int, end: int, tables: Tables, words: Words,
                scratch: Scratch, out: Array, n_out: Int) -> Int:  # fmt: skip
    """Write the ids of a piece that the table of words does not have; return their number."""
    n = end - start
    if n > MEDIUM_BYTES:
        return _encode_long(data, start, end, tables, scratch, out, n_out)
    n_ids = _merge(data, start, n, tables, scratch, out, n_out)
    learn_word(data, start, n, words, out, n_out, n_ids)
    return n_ids


@kernel
def _write_known(
    data: Array, start: int, ends: Array, piece: Int, n_pieces: int, short: Array, medium: Array,
    listed: Array, out: Array, n_out: Int,
) -> tuple[Int, Int]:  # fmt: skip
    """Write the ids of pieces from number ``piece`` on, up to one that the tables do not have.

    This loop is where the time goes. It calls nothing that takes arrays, and the tables come one by
    one: numba counts references when arrays are passed on or come out of a tuple, which would cost
    more than the search for a piece.

    Returns:
        That one, or ``n_pieces``, and the number of ids in ``out``.
    """
    last_short, last_medium = len(short) - 1, len(medium) - 1
    at = start + (np.int64(ends[piece - 1]) if piece else 0)
    while piece < n_pieces:
        next_at = start + np.int64(ends[piece])
        n, ids = next_at - at, NONE
        if n <= SHORT_BYTES:
            low = short_key(data, at, n)
            row = slot_of(low, NONE) & last_short
            found = word_at(short, 2 * row)
            while found != low and found != NONE:
                row = (row + 1) & last_short
                found = word_at(short, 2 * row)
            ids = word_at(short, 2 * row + 1)
        elif n <= MEDIUM_BYTES:
            low, high = load64(data, at), upper_key(data, at, n)
            row = slot_of(low, high) & last_medium
            found = word_at(medium, 4 * row + 1)
            while found != NONE and (found != high or word_at(medium, 4 * row) != low):
                row = (row + 1) & last_medium
                found = word_at(medium, 4 * row + 1)
            ids = word_at(medium, 4 * row + 2)
        n_ids = np.int64(ids >> COUNT_BITS)
        if n_ids == 0:
            break
        # two are written whatever their number: that costs less than asking
        put(out, n_out, ids & ID_MASK)
        put(out, n_out + 1, (ids >> ID_BITS) & ID_MASK)
        if n_ids == LISTED:
            place, n_ids = np.int64(ids & PLACE_MASK), np.int64(ids >> HALF & LIST_COUNT_MASK)
            for i in range(n_ids):
                put(out, n_out + i, np.uint64(listed[place + i]))
        n_out += n_ids
        at = next_at
        piece += 1
    return piece, n_out


@kernel
def _encode_part(data: Array, start: int, end: int, tables: Tables, words: Words,
                 scratch: Scratch, out: Array, n_out: Int) -> Int:  # fmt: skip
    """Write the ids of a text to ``out``; return the new number of ids."""
    ends, short, medium, listed = scratch.ends, words.short, words.medium, words.ids
    n_pieces = cut(data, start, end, tables.classes, ends)
    piece = 0
    while True:
        piece, n_out = _write_known(
            data, start, ends, piece, n_pieces, short, medium, listed, out, n_out
        )
        if piece == n_pieces:
            return n_out
        at = start + (np.int64(ends[piece - 1]) if piece else 0)
        next_at = start + np.int64(ends[piece])
        n_out += _encode_new(data, at, next_at, tables, words, scratch, out, n_out)
        piece += 1


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
def _seen_size(n_bytes: int) -> int:
    size = 256
    while size * 512 < n_bytes and size < _MAX_SEEN:
        size *= 2
    return size


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
        np.zeros((_seen_size(len(data)), 4), np.int64),
        np.empty(SHORT_PIECE_BYTES, np.int64),
        np.empty(SHORT_PIECE_BYTES, np.int64),
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
