"""Compiled byte-pair encoding of many documents at once, for Llama 3's pattern.

The regular expression of :data:`~puna.tokens.pretokens.LLAMA3_PATTERN` is written out as a scanner
over UTF-8, byte-pair merges use two read-only hash tables, and nothing is allocated per piece. The
result is that of Llama 3's own tokenizer (tiktoken): of all neighbours that form a token, the pair
with the lowest rank merges first, the leftmost of equals.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from puna.data.kernels.buffers import FNV_PRIME, FNV_SEED, MIX, Array, kernel
from puna.tokens.pretokens import MAX_CHARS, MAX_RUN_CHARS

OTHER, LETTER, NUMBER, SPACE, NEWLINE = 0, 1, 2, 3, 4
"""Character classes; letters, numbers and whitespace as in the pattern, newline is CR or LF."""

Word = Any
"""A machine integer inside a compiled kernel: its width matters there, to checkers it is opaque."""

NO_ID = -1
_NO_RANK: Word = np.int64(1) << 40
_EMPTY_KEY = np.uint64(0xFFFFFFFFFFFFFFFF)
_SHORT_PIECE_BYTES = 96
_MAX_SEEN = 1 << 16


@kernel
def _hash_bytes(data: Array, start: int, end: int) -> Word:
    value = FNV_SEED
    for i in range(start, end):
        value = (value ^ np.uint64(data[i])) * FNV_PRIME
    return value ^ (value >> np.uint64(29))


@kernel
def fill_vocabulary(arena: Array, starts: Array, slots: Array) -> None:
    """Enter each token, ``arena[starts[i]:starts[i+1]]`` for id i, into the hash table."""
    mask = np.uint64(len(slots) - 1)
    for token in range(len(starts) - 1):
        at = _hash_bytes(arena, starts[token], starts[token + 1]) & mask
        while slots[at] != NO_ID:
            at = (at + np.uint64(1)) & mask
        slots[at] = token


@kernel
def fill_pairs(lefts: Array, rights: Array, merged: Array, keys: Array, values: Array) -> None:
    """Enter each merge (left id, right id) -> merged id into the hash table."""
    mask = np.uint64(len(keys) - 1)
    for i in range(len(lefts)):
        key = (np.uint64(lefts[i]) << np.uint64(32)) | np.uint64(rights[i])
        at = ((key * MIX) >> np.uint64(20)) & mask
        while keys[at] != _EMPTY_KEY and keys[at] != key:
            at = (at + np.uint64(1)) & mask
        keys[at], values[at] = key, merged[i]


@kernel
def _same_bytes(left: Array, left_start: int, right: Array, right_start: int, n: int) -> bool:
    for i in range(n):  # noqa: SIM110 - a generator would not compile
        if left[left_start + i] != right[right_start + i]:
            return False
    return True


@kernel
def _find_token(
    digest: Word, data: Array, start: int, end: int, arena: Array, starts: Array, slots: Array
) -> int:
    mask = np.uint64(len(slots) - 1)
    at = digest & mask
    while slots[at] != NO_ID:
        token = slots[at]
        first = starts[token]
        n = end - start
        if starts[token + 1] - first == n and _same_bytes(arena, first, data, start, n):
            return token
        at = (at + np.uint64(1)) & mask
    return NO_ID


@kernel
def _find_pair(left: int, right: int, keys: Array, values: Array) -> Word:
    mask = np.uint64(len(keys) - 1)
    key = (np.uint64(left) << np.uint64(32)) | np.uint64(right)
    at = ((key * MIX) >> np.uint64(20)) & mask
    while keys[at] != _EMPTY_KEY:
        if keys[at] == key:
            return np.int64(values[at])
        at = (at + np.uint64(1)) & mask
    return _NO_RANK


@kernel
def _char(data: Array, at: int, classes: Array) -> tuple[Word, Word, int]:
    """Return the code point at a byte, its class and its width in bytes (valid UTF-8 assumed)."""
    first = np.int64(data[at])
    if first < 0x80:
        return first, classes[first], 1
    if first < 0xE0:
        code, width = ((first & 0x1F) << 6) | (data[at + 1] & 0x3F), 2
    elif first < 0xF0:
        code = ((first & 0x0F) << 12) | ((data[at + 1] & 0x3F) << 6) | (data[at + 2] & 0x3F)
        width = 3
    else:
        code = ((first & 0x07) << 18) | ((data[at + 1] & 0x3F) << 12)
        code |= ((data[at + 2] & 0x3F) << 6) | (data[at + 3] & 0x3F)
        width = 4
    return code, classes[code] if code < len(classes) else np.uint8(OTHER), width


@kernel
def _run(data: Array, at: int, end: int, classes: Array, kind: int, limit: int) -> int:
    """Return the end of a run of at most ``limit`` characters of one class."""
    while at < end and limit > 0:
        byte = data[at]
        if byte < 0x80:
            found, width = classes[byte], 1
        else:
            _, found, width = _char(data, at, classes)
        if found != kind:
            break
        at += width
        limit -= 1
    return at


@kernel
def _contraction(data: Array, at: int, end: int) -> int:
    """Return the length of 's 't 're 've 'm 'll 'd after the quote at ``at``, or 0."""
    if end - at < 2:
        return 0
    one = data[at + 1] | 0x20  # ASCII lower case
    if one == 0x73 or one == 0x74 or one == 0x6D or one == 0x64:
        return 2
    if end - at < 3:
        return 0
    if data[at + 1] == 0xC5 and data[at + 2] == 0xBF:  # long s folds to s
        return 3
    two = data[at + 2] | 0x20
    if (one == 0x72 or one == 0x76) and two == 0x65:
        return 3
    return 3 if one == 0x6C and two == 0x6C else 0


@kernel
def _space_end(data: Array, at: int, end: int, classes: Array) -> int:
    """Return where a piece of whitespace ends: the pattern's last three alternatives."""
    stop, last, after_newline = at, at, at
    while stop < end:
        _, kind, width = _char(data, stop, classes)
        if kind < SPACE:
            break
        last = stop
        stop += width
        if kind == NEWLINE:
            after_newline = stop
    if after_newline > at:
        return after_newline
    return stop if stop == end or last == at else last


@kernel
def _piece_end(data: Array, at: int, end: int, classes: Array) -> int:
    """Return where the piece that starts at ``at`` ends."""
    code, kind, width = _char(data, at, classes)
    if code == 0x27:
        length = _contraction(data, at, end)
        if length:
            return at + length
    if kind == LETTER:
        return _run(data, at + width, end, classes, LETTER, end)
    if kind == NUMBER:
        return _run(data, at + width, end, classes, NUMBER, 2)
    follower = np.int64(NEWLINE)
    if at + width < end:
        follower = np.int64(_char(data, at + width, classes)[1])
    if follower == LETTER and kind != NEWLINE:
        return _run(data, at + width, end, classes, LETTER, end)
    if kind == OTHER or (code == 0x20 and follower == OTHER):
        stop = _run(data, at + width, end, classes, OTHER, end)
        return _run(data, stop, end, classes, NEWLINE, end)
    return _space_end(data, at, end, classes)


@kernel
def _merge_short(ids: Array, ranks: Array, n: int, keys: Array, values: Array) -> int:
    """Merge ``n`` ids in place, lowest rank first, found by scanning; return how many remain."""
    for i in range(n - 1):
        ranks[i] = _find_pair(ids[i], ids[i + 1], keys, values)
    while n > 1:
        best, at = _NO_RANK, 0
        for i in range(n - 1):
            if ranks[i] < best:
                best, at = ranks[i], i
        if best == _NO_RANK:
            break
        ids[at] = best
        for i in range(at + 1, n - 1):
            ids[i] = ids[i + 1]
            ranks[i] = ranks[i + 1]
        n -= 1
        if at > 0:
            ranks[at - 1] = _find_pair(ids[at - 1], ids[at], keys, values)
        if at < n - 1:
            ranks[at] = _find_pair(ids[at], ids[at + 1], keys, values)
    return n


@kernel
def _merge_long(ids: Array, n: int, keys: Array, values: Array) -> int:
    """Do what :func:`_merge_short` does, with a heap: n log n instead of n squared."""
    shift = np.int64(32)
    following = np.arange(1, n + 1)
    before = np.arange(-1, n - 1)
    alive = np.ones(n, np.bool_)
    heap = [np.int64(0) for _ in range(0)]
    for i in range(n - 1):
        rank = _find_pair(ids[i], ids[i + 1], keys, values)
        if rank != _NO_RANK:
            heapq.heappush(heap, (rank << shift) | i)
    while len(heap):
        top = heapq.heappop(heap)
        rank, at = top >> shift, top & np.int64(0xFFFFFFFF)
        if not alive[at] or following[at] >= n:
            continue
        right = following[at]
        if _find_pair(ids[at], ids[right], keys, values) != rank:
            continue  # one of the two has merged with another neighbour since
        ids[at] = rank
        alive[right] = False
        following[at] = following[right]
        if following[at] < n:
            before[following[at]] = at
            pair = _find_pair(ids[at], ids[following[at]], keys, values)
            if pair != _NO_RANK:
                heapq.heappush(heap, (pair << shift) | at)
        if before[at] >= 0:
            pair = _find_pair(ids[before[at]], ids[at], keys, values)
            if pair != _NO_RANK:
                heapq.heappush(heap, (pair << shift) | before[at])
    left, at = 0, 0
    while at < n:
        ids[left] = ids[at]
        left += 1
        at = following[at]
    return left


@kernel
def _seen_size(n_bytes: int) -> int:
    size = 256
    while size * 64 < n_bytes and size < _MAX_SEEN:
        size *= 2
    return size


@kernel
def _encode_piece(
    digest: Word,
    data: Array,
    start: int,
    end: int,
    byte_ids: Array,
    keys: Array,
    values: Array,
    out: Array,
    n_out: int,
    seen: Array,
    short_ids: Array,
    ranks: Array,
) -> int:
    """Write the ids of a piece that is no token to ``out``; return their number.

    A piece that was met before in this call is copied from where its ids stand in ``out``.
    """
    n = end - start
    slot = seen[np.int64(digest % np.uint64(len(seen)))]
    if slot[1] == n and _same_bytes(data, slot[0], data, start, n):
        for i in range(slot[3]):
            out[n_out + i] = out[slot[2] + i]
        return slot[3]
    ids = short_ids if n <= _SHORT_PIECE_BYTES else np.empty(n, np.int64)
    for i in range(n):
        ids[i] = byte_ids[data[start + i]]
    if n <= _SHORT_PIECE_BYTES:
        n_ids = _merge_short(ids, ranks, n, keys, values)
    else:
        n_ids = _merge_long(ids, n, keys, values)
    for i in range(n_ids):
        out[n_out + i] = ids[i]
    slot[0], slot[1], slot[2], slot[3] = start, n, n_out, n_ids
    return n_ids


@kernel
def _part_end(data: Array, at: int, end: int, classes: Array, chars_left: int) -> tuple[int, int]:
    """Return where a part of a huge text ends (see ``split_huge``), and its block's rest."""
    run_chars, run_space = 0, False
    while at < end:
        if chars_left == 0:
            return at, MAX_CHARS
        code, kind, width = _char(data, at, classes)
        space = kind >= SPACE or 0x1C <= code <= 0x1F  # as str.isspace
        if space == run_space and run_chars:
            run_chars += 1
            if run_chars > MAX_RUN_CHARS:
                return at, chars_left
        else:
            run_chars, run_space = 1, space
        chars_left -= 1
        at += width
    return end, chars_left


@kernel
def encode_documents(
    data: Array,
    offsets: Array,
    bos: int,
    eos: int,
    classes: Array,
    byte_ids: Array,
    arena: Array,
    starts: Array,
    slots: Array,
    keys: Array,
    values: Array,
    out: Array,
    lengths: Array,
) -> int:
    """Encode documents one after the other.

    Args:
        data: UTF-8 of all documents.
        offsets: Start of each document in ``data``, and the end of the last.
        bos: Id put before each document, or -1 for none.
        eos: Id put after each document, or -1 for none.
        classes: Class of each code point; those beyond the table are OTHER.
        byte_ids: Id of each byte.
        arena: Bytes of all tokens.
        starts: Start of each token in ``arena``.
        slots: Hash table of :func:`fill_vocabulary`.
        keys: Hash table of :func:`fill_pairs`.
        values: Hash table of :func:`fill_pairs`.
        out: Receives the ids; room for every byte and two ids per document.
        lengths: Receives the number of ids of each document.

    Returns:
        Number of ids written.
    """
    # pieces of this call that took merging: start, length, first id in `out`, number of ids
    seen = np.zeros((_seen_size(len(data)), 4), np.int64)
    ids, ranks = np.empty(_SHORT_PIECE_BYTES, np.int64), np.empty(_SHORT_PIECE_BYTES, np.int64)
    n_out = 0
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        first_out = n_out
        if bos >= 0:
            out[n_out] = bos
            n_out += 1
        huge = end - at > MAX_RUN_CHARS
        chars_left = MAX_CHARS
        while at < end:
            part_end = end
            if huge:
                part_end, chars_left = _part_end(data, at, end, classes, chars_left)
            while at < part_end:
                stop = _piece_end(data, at, part_end, classes)
                digest = _hash_bytes(data, at, stop)
                whole = _find_token(digest, data, at, stop, arena, starts, slots)
                if whole != NO_ID:
                    out[n_out] = whole
                    n_out += 1
                else:
                    n_out += _encode_piece(
                        digest, data, at, stop, byte_ids, keys, values, out, n_out, seen, ids, ranks
                    )
                at = stop
        if eos >= 0:
            out[n_out] = eos
            n_out += 1
        lengths[document] = n_out - first_out
    return n_out
