"""Merging the bytes of a piece, lowest rank first, with hash tables that are only read."""

from __future__ import annotations

import heapq

import numpy as np

from puna.data.kernels.buffers import MIX, Array, Int, kernel
from puna.tokens.kernels.bits import LANES, LINE_WORDS, fetch, least, least_match, word_at
from puna.tokens.kernels.scan import Word

SHORT_PLACES = LANES * LANES
"""Places for the bytes of a piece and for one more on either side."""
SHORT_PIECE_BYTES = SHORT_PLACES - 2
"""Pieces up to this length are merged by looking at all pairs, longer ones with a heap."""
MAX_ID = (1 << 21) - 1
"""Largest id: two ids and the id they merge to share a word of 64 bits."""
_ID_BITS = np.uint64(21)
_NO_MERGE: Word = np.uint64(MAX_ID)
SIEVE_WORDS = 1 << 15
"""Words of 64 bits: 256 KiB, of which Llama 3's 280,000 pairs set an eighth."""
_SIEVE_SHIFT = np.uint64(64 - 21)
_SIX, _LAST_BIT, _ONE = np.uint64(6), np.uint64(63), np.uint64(1)
_HALF = np.uint64(32)
_NO_KEY = np.uint64(0xFFFFFFFF)
_LAST_KEY = np.uint64(MAX_ID << 8)
"""Keys from this one on are of no pair."""
_PLACE_BITS = np.uint64(8)
_PLACE = np.uint64(SHORT_PLACES - 1)
_FREE = np.uint64(0xFFFFFFFFFFFFFFFF)


@kernel
def _line_of(mixed: Word, pairs: Array) -> Word:
    """Return where the line of a pair begins."""
    return np.int64(mixed >> _HALF) & (len(pairs) - LINE_WORDS)


@kernel
def _possible_line(left: Word, right: Word, pairs: Array, sieve: Array) -> tuple[Word, Word]:
    """Return the key of a pair and its line, or the first line if the sieve says that it has none.

    Almost half of the pairs that are asked for make no token. The sieve is small enough for the
    caches of a core, ``pairs`` is not.
    """
    key = (np.uint64(left) << _ID_BITS) | np.uint64(right)
    mixed = key * MIX
    bit = mixed >> _SIEVE_SHIFT
    word = word_at(sieve, np.int64(bit >> _SIX))
    is_possible = np.int64((word >> (bit & _LAST_BIT)) & _ONE)
    return key, _line_of(mixed, pairs) & -is_possible


@kernel
def _find_pair(left: Word, right: Word, pairs: Array, sieve: Array) -> Word:
    """Return what two ids merge to, or :data:`_NO_MERGE`."""
    key, at = _possible_line(left, right, pairs, sieve)
    merged = least_match(pairs, at, key, _ID_BITS)
    while merged == _NO_MERGE and word_at(pairs, at + LINE_WORDS - 1) != _FREE:
        at = (at + LINE_WORDS) & (len(pairs) - 1)
        merged = least_match(pairs, at, key, _ID_BITS)
    return merged


@kernel
def _fetch_pair(left: Word, right: Word, pairs: Array, sieve: Array) -> None:
    """Ask for the line of a pair, which is wanted soon."""
    fetch(pairs, _possible_line(left, right, pairs, sieve)[1])


@kernel
def fill_pairs(lefts: Array, rights: Array, merged: Array, pairs: Array, sieve: Array,
               byte_ids: Array, byte_pairs: Array) -> None:  # fmt: skip
    """Enter each merge (left id, right id) -> merged id.

    Args:
        lefts: Left ids.
        rights: Right ids.
        merged: The ids they merge to.
        pairs: Hash table, uint64, a power of two of words with all bits set. A pair stands in its
            line of 8 words, or where that is full, in the next one with room.
        sieve: uint64, :data:`SIEVE_WORDS` zeros; receives a bit for each pair, found by its hash.
        byte_ids: Id of each byte.
        byte_pairs: int32, receives the id that each two bytes merge to.
    """
    for i in range(len(lefts)):
        key = (np.uint64(lefts[i]) << _ID_BITS) | np.uint64(rights[i])
        mixed = key * MIX
        bit = mixed >> _SIEVE_SHIFT
        sieve[np.int64(bit >> _SIX)] |= _ONE << (bit & _LAST_BIT)
        at = _line_of(mixed, pairs)
        while pairs[at] != _FREE and pairs[at] >> _ID_BITS != key:
            at = (at + 1) & (len(pairs) - 1)
        pairs[at] = (key << _ID_BITS) | np.uint64(merged[i])
    for left in range(256):
        for right in range(256):
            pair = _find_pair(byte_ids[left], byte_ids[right], pairs, sieve)
            byte_pairs[256 * left + right] = pair


@kernel
def _key(merged: Word, place: int) -> Word:
    return (np.uint64(merged) << _PLACE_BITS) | np.uint64(place)


@kernel
def merge_short(
    data: Array, start: int, n: int, byte_ids: Array, byte_pairs: Array, pairs: Array,
    sieve: Array, keys: Array, chain: Array, out: Array, n_out: Int,
) -> int:  # fmt: skip
    """Merge the bytes of a piece, lowest rank first; write the ids and return their number.

    Ids stay in the place of their first byte, and a pair has the place of its left one. The key of
    a pair is its rank with its place below, so that the least key is the one to merge, and the
    leftmost of equals. It is found in two steps of 16: a merge changes the keys of three places
    only, and costs the same however long the piece is.

    Args:
        data: Text.
        start: Start of the piece.
        n: Bytes of the piece, 1 to :data:`SHORT_PIECE_BYTES`.
        byte_ids: Id of each byte.
        byte_pairs: What each two bytes merge to.
        pairs: Of :func:`fill_pairs`.
        sieve: Of :func:`fill_pairs`.
        keys: Scratch, uint32: the keys and, in the last row, the least of each row of 16.
        chain: Scratch, int64: of each place the id, the place of the next and of the one before.
        out: Receives the ids.
        n_out: From here on.
    """
    n_rows = (n + LANES) // LANES
    top = SHORT_PLACES if n_rows > 1 else 0
    byte = np.int64(data[start])
    for i in range(1, n + 1):
        next_byte = np.int64(data[start + i])
        keys[i] = _key(byte_pairs[256 * byte + next_byte], i)
        chain[i, 0], chain[i, 1], chain[i, 2] = byte_ids[byte], i + 1, i - 1
        byte = next_byte
    keys[0], chain[0, 0], chain[n + 1, 0] = _NO_KEY, _NO_MERGE, _NO_MERGE
    for i in range(n, LANES * n_rows):
        keys[i] = _NO_KEY
    for i in range(1, n):
        if keys[i] < min(keys[i - 1], keys[i + 1], _LAST_KEY):  # merges before its neighbours
            merged = np.int64(keys[i] >> _PLACE_BITS)
            _fetch_pair(chain[i - 1, 0], merged, pairs, sieve)
            _fetch_pair(merged, chain[i + 2, 0], pairs, sieve)
    if n_rows > 1:
        for row in range(LANES):
            keys[SHORT_PLACES + row] = least(keys, LANES * row) if row < n_rows else _NO_KEY
    while True:
        key = least(keys, top)
        if key >= _LAST_KEY:
            break
        at, merged = np.int64(key & _PLACE), np.int64(key >> _PLACE_BITS)
        right, left = chain[at, 1], chain[at, 2]
        after = chain[right, 1]
        chain[at, 0], chain[at, 1], chain[after, 2] = merged, after, at
        keys[right] = _NO_KEY
        keys[at] = _key(_find_pair(merged, chain[after, 0], pairs, sieve), at)
        keys[left] = _key(_find_pair(chain[left, 0], merged, pairs, sieve), left)
        if n_rows > 1:
            for place in (left, at, right):
                keys[SHORT_PLACES + place // LANES] = least(keys, place & -LANES)
    n_ids, at = 0, 1
    while at <= n:
        out[n_out + n_ids] = chain[at, 0]
        n_ids += 1
        at = chain[at, 1]
    return n_ids


@kernel
def merge_long(ids: Array, n: int, pairs: Array, sieve: Array) -> int:
    """Merge ``n`` ids in place with a heap; return how many remain."""
    shift = np.int64(32)
    following = np.arange(1, n + 1)
    before = np.arange(-1, n - 1)
    alive = np.ones(n, np.bool_)
    heap = [np.int64(0) for _ in range(0)]
    for i in range(n - 1):
        rank = _find_pair(ids[i], ids[i + 1], pairs, sieve)
        if rank != _NO_MERGE:
            heapq.heappush(heap, (np.int64(rank) << shift) | i)
    while len(heap):
        top = heapq.heappop(heap)
        rank, at = top >> shift, top & np.int64(0xFFFFFFFF)
        if not alive[at] or following[at] >= n:
            continue
        right = following[at]
        if _find_pair(ids[at], ids[right], pairs, sieve) != np.uint64(rank):
            continue  # one of the two has merged with another neighbour since
        ids[at] = rank
        alive[right] = False
        following[at] = following[right]
        if following[at] < n:
            before[following[at]] = at
            pair = _find_pair(ids[at], ids[following[at]], pairs, sieve)
            if pair != _NO_MERGE:
                heapq.heappush(heap, (np.int64(pair) << shift) | at)
        if before[at] >= 0:
            pair = _find_pair(ids[before[at]], ids[at], pairs, sieve)
            if pair != _NO_MERGE:
                heapq.heappush(heap, (np.int64(pair) << shift) | before[at])
    left, at = 0, 0
    while at < n:
        ids[left] = ids[at]
        left += 1
        at = following[at]
    return left
