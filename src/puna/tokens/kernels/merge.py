"""Merging the bytes of a piece, lowest rank first, with hash tables that are only read."""

from __future__ import annotations

import heapq

import numpy as np

from puna.data.kernels.buffers import FNV_SEED, MIX, Array, kernel
from puna.tokens.kernels.bits import load64
from puna.tokens.kernels.scan import Word

NO_ID = -1
SHORT_PIECE_BYTES = 96
"""Pieces up to this length are merged by scanning, longer ones with a heap."""
MAX_ID = (1 << 21) - 1
"""Largest id: two ids and the id they merge to share a word of 64 bits."""
_ID_BITS = np.uint64(21)
_NO_RANK: Word = np.int64(0x7FFFFFFF)
_FREE = np.uint64(0xFFFFFFFFFFFFFFFF)


@kernel
def hash_bytes(data: Array, start: int, end: int) -> Word:
    """Return a hash of at least 8 bytes."""
    value = FNV_SEED
    for at in range(start, end - 8, 8):
        value = (value ^ load64(data, at)) * MIX
        value ^= value >> np.uint64(32)
    value = (value ^ load64(data, end - 8)) * MIX
    return value ^ (value >> np.uint64(32))


@kernel
def fill_vocabulary(arena: Array, starts: Array, slots: Array) -> None:
    """Enter each token, ``arena[starts[i]:starts[i+1]]`` for id i, into the hash table."""
    mask = np.uint64(len(slots) - 1)
    for token in range(len(starts) - 1):
        at = hash_bytes(arena, starts[token], starts[token + 1]) & mask
        while slots[at] != NO_ID:
            at = (at + np.uint64(1)) & mask
        slots[at] = token


@kernel
def _find_pair(left: int, right: int, pairs: Array) -> Word:
    mask = np.uint64(len(pairs) - 1)
    key = (np.uint64(left) << _ID_BITS) | np.uint64(right)
    at = (key * MIX) >> np.uint64(32) & mask
    while pairs[at] != _FREE:
        if pairs[at] >> _ID_BITS == key:
            return np.int64(pairs[at] & np.uint64(MAX_ID))
        at = (at + np.uint64(1)) & mask
    return _NO_RANK


@kernel
def fill_pairs(lefts: Array, rights: Array, merged: Array, pairs: Array, byte_ids: Array,
               byte_pairs: Array) -> None:  # fmt: skip
    """Enter each merge (left id, right id) -> merged id.

    Args:
        lefts: Left ids.
        rights: Right ids.
        merged: The ids they merge to.
        pairs: Hash table, uint64, a power of two of slots with all bits set.
        byte_ids: Id of each byte.
        byte_pairs: int32, receives the id that each two bytes merge to.
    """
    mask = np.uint64(len(pairs) - 1)
    for i in range(len(lefts)):
        key = (np.uint64(lefts[i]) << _ID_BITS) | np.uint64(rights[i])
        at = (key * MIX) >> np.uint64(32) & mask
        while pairs[at] != _FREE and pairs[at] >> _ID_BITS != key:
            at = (at + np.uint64(1)) & mask
        pairs[at] = (key << _ID_BITS) | np.uint64(merged[i])
    for left in range(256):
        for right in range(256):
            byte_pairs[256 * left + right] = _find_pair(byte_ids[left], byte_ids[right], pairs)


@kernel
def same_bytes(left: Array, left_start: int, right: Array, right_start: int, n: int) -> bool:
    """Tell whether ``n`` bytes, at least 8, are equal."""
    for at in range(0, n - 8, 8):
        if load64(left, left_start + at) != load64(right, right_start + at):
            return False
    return load64(left, left_start + n - 8) == load64(right, right_start + n - 8)


@kernel
def find_token(
    digest: Word, data: Array, start: int, end: int, arena: Array, starts: Array, slots: Array
) -> int:
    """Return the number of the token with these bytes, or :data:`NO_ID`."""
    mask = np.uint64(len(slots) - 1)
    at = digest & mask
    while slots[at] != NO_ID:
        token = slots[at]
        first = starts[token]
        n = end - start
        if starts[token + 1] - first == n and same_bytes(arena, first, data, start, n):
            return token
        at = (at + np.uint64(1)) & mask
    return NO_ID


@kernel
def merge_short(ids: Array, ranks: Array, n: int, pairs: Array) -> int:
    """Merge ``n`` ids in place, lowest rank first, found by scanning; return how many remain.

    Args:
        ids: The ids.
        ranks: Rank of each id with the next; what no merge makes has a rank above all ids.
        n: How many.
        pairs: Hash table of :func:`fill_pairs`.
    """
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
            ranks[at - 1] = _find_pair(ids[at - 1], ids[at], pairs)
        if at < n - 1:
            ranks[at] = _find_pair(ids[at], ids[at + 1], pairs)
    return n


@kernel
def merge_long(ids: Array, n: int, pairs: Array) -> int:
    """Do what :func:`merge_short` does, with a heap: n log n instead of n squared."""
    shift = np.int64(32)
    following = np.arange(1, n + 1)
    before = np.arange(-1, n - 1)
    alive = np.ones(n, np.bool_)
    heap = [np.int64(0) for _ in range(0)]
    for i in range(n - 1):
        rank = _find_pair(ids[i], ids[i + 1], pairs)
        if rank != _NO_RANK:
            heapq.heappush(heap, (rank << shift) | i)
    while len(heap):
        top = heapq.heappop(heap)
        rank, at = top >> shift, top & np.int64(0xFFFFFFFF)
        if not alive[at] or following[at] >= n:
            continue
        right = following[at]
        if _find_pair(ids[at], ids[right], pairs) != rank:
            continue  # one of the two has merged with another neighbour since
        ids[at] = rank
        alive[right] = False
        following[at] = following[right]
        if following[at] < n:
            before[following[at]] = at
            pair = _find_pair(ids[at], ids[following[at]], pairs)
            if pair != _NO_RANK:
                heapq.heappush(heap, (pair << shift) | at)
        if before[at] >= 0:
            pair = _find_pair(ids[before[at]], ids[at], pairs)
            if pair != _NO_RANK:
                heapq.heappush(heap, (pair << shift) | before[at])
    left, at = 0, 0
    while at < n:
        ids[left] = ids[at]
        left += 1
        at = following[at]
    return left
