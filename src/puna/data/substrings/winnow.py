"""Blocks of a batch: runs of windows that have one fingerprint.

A *window* is a piece of ``size`` bytes, a *gram* a piece of ``size // 2`` bytes. Each window is
represented by one of its grams: the one with the smallest hash, the last one if several are equal
(robust winnowing, Schleimer, Wilkerson and Aiken 2003). The choice depends on the window's bytes
alone, so two equal windows are represented by equal grams: windows need to be compared only with
those of the same fingerprint. Consecutive windows with the same gram form a *block*; the blocks of
a text have each of its windows exactly once (super-k-mers, Li et al. 2013, "MSPKmerCounter").
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from puna.data.kernels.buffers import MIX, Array, Int, Texts, find_slot, kernel
from puna.data.kernels.normal_words import mixed

_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_OTHER = np.uint64(0xC2B2AE3D27D4EB4F)


class Blocks(NamedTuple):
    """The blocks of a batch, in order.

    Attributes:
        keys: uint64 [n]; fingerprints, never 0.
        starts: int64 [n]; byte of the batch's data where the first window begins.
        n_windows: int64 [n]; the block has ``n_windows + size - 1`` bytes.
        bounds: int64 [n_docs + 1]; document ``d`` has the blocks ``bounds[d]`` to
            ``bounds[d + 1]``.
    """

    keys: np.ndarray
    starts: np.ndarray
    n_windows: np.ndarray
    bounds: np.ndarray


@kernel
def _grown(rows: Array) -> Array:
    larger = np.empty((2 * len(rows), rows.shape[1]), np.int64)
    larger[: len(rows)] = rows
    return larger


@kernel
def _with_row(rows: Array, n: Int, key: Int, first: Int, behind: Int) -> Array:
    """Write block ``n``, in a larger array if need be."""
    if n == len(rows):
        rows = _grown(rows)
    rows[n, 0], rows[n, 1], rows[n, 2] = np.int64(key), first, behind - first
    return rows


@kernel
def _last_smallest(ring: Array, slot: Int, first: Int) -> tuple[Int, Int]:
    """Return the smallest hash of a full ring and its gram; ``slot`` is that of gram ``first``."""
    best, best_at = ring[slot], first
    for k in range(1, len(ring)):
        slot = slot + 1 if slot + 1 < len(ring) else 0
        if ring[slot] <= best:
            best, best_at = ring[slot], first + k
    return best, best_at


@kernel
def _power(factor: Int, exponent: Int) -> Int:
    value = np.uint64(1)
    for _ in range(exponent):
        value *= factor
    return value


@kernel
def _find(data: Array, offsets: Array, alive: Array, size: Int) -> tuple[Array, Array]:
    gram = size // 2
    n_grams = size - gram + 1
    away = _power(_FACTOR, gram)
    ring = np.empty(n_grams, np.uint64)
    rows = np.empty((1024, 3), np.int64)
    bounds = np.zeros(len(offsets), np.int64)
    n = 0
    for d in range(len(offsets) - 1):
        bounds[d + 1] = n
        start, end = offsets[d], offsets[d + 1]
        if not alive[d] or end - start < size:
            continue
        value, best, best_at, slot = np.uint64(0), np.uint64(0), np.int64(-1), 0
        key, key_at, first = np.uint64(0), np.int64(-1), start
        for i in range(start, end):
            value = value * _FACTOR + np.uint64(data[i]) + np.uint64(1)
            at = i - gram + 1
            if at < start:
                continue
            if at > start:
                value -= (np.uint64(data[at - 1]) + np.uint64(1)) * away
            here, window = mixed(value), at - n_grams + 1
            ring[slot] = here
            slot = slot + 1 if slot + 1 < n_grams else 0
            if best_at < 0 or here <= best:
                best, best_at = here, at
            elif best_at < window:
                best, best_at = _last_smallest(ring, slot, window)
            if window < start or best_at == key_at:
                continue
            if key_at >= 0:
                rows = _with_row(rows, n, key, first, window)
                n += 1
            key, key_at, first = max(best, np.uint64(1)), best_at, window
        rows = _with_row(rows, n, key, first, end - size + 1)
        n += 1
        bounds[d + 1] = n
    return rows[:n], bounds


def find_blocks(texts: Texts, alive: np.ndarray, size: int) -> Blocks:
    """Divide the windows of texts into blocks.

    Args:
        texts: The batch.
        alive: bool per text; a text that is not alive has no blocks.
        size: Bytes of a window, at least 8; shorter texts have no blocks.
    """
    rows, bounds = _find(texts.data, texts.offsets, alive, size)
    rows = np.ascontiguousarray(rows.T)
    return Blocks(rows[0].view(np.uint64), rows[1], rows[2], bounds)


@kernel
def _word(data: Array, at: Int) -> Int:
    word = np.uint64(0)
    for k in range(8):
        word |= np.uint64(data[at + k]) << np.uint64(8 * k)
    return word


@kernel
def _digest(data: Array, start: Int, n_bytes: Int) -> tuple[Int, Int]:
    """Hash a piece of at least 8 bytes to two words, which no short change leaves as they are."""
    one, two = np.uint64(n_bytes) * MIX, np.uint64(n_bytes) * _OTHER
    i, end = start, start + n_bytes
    while i < end:
        word = _word(data, min(i, end - 8))
        one = (one ^ word) * MIX
        one ^= one >> np.uint64(32)
        two = (two + word) * _OTHER
        two ^= two >> np.uint64(29)
        i += 8
    return mixed(one * _OTHER), mixed(two * MIX)


@kernel
def _describe(
    data: Array, offsets: Array, keys: Array, starts: Array, n_windows: Array, bounds: Array,
    size: Int, table: Array, used: Array,
) -> tuple[Array, Array]:  # fmt: skip
    rows, ends = np.empty((1024, 6), np.int64), np.zeros(len(bounds), np.int64)
    n, mask = 0, len(table) - 1
    for d in range(len(bounds) - 1):
        last_end = np.int64(-1)
        for b in range(bounds[d], bounds[d + 1]):
            if used[find_slot(table, used, mask, keys[b])] == 0:
                continue
            one, two = _digest(data, starts[b], n_windows[b] + size - 1)
            start = starts[b] - offsets[d]
            if (
                start == last_end and rows[n - 1, 1] == np.int64(one)
                and rows[n - 1, 2] == np.int64(two) and rows[n - 1, 0] == np.int64(keys[b])
                and rows[n - 1, 4] == n_windows[b]
            ):  # fmt: skip
                rows[n - 1, 5] += 1
            else:
                if n == len(rows):
                    rows = _grown(rows)
                rows[n, 0], rows[n, 1], rows[n, 2] = np.int64(keys[b]), np.int64(one), np.int64(two)
                rows[n, 3], rows[n, 4], rows[n, 5] = start, n_windows[b], 1
                n += 1
            last_end = start + n_windows[b]
        ends[d + 1] = n
    return rows[:n], ends


def describe_blocks(
    texts: Texts, blocks: Blocks, size: int, table: np.ndarray, used: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hash the blocks whose fingerprint is in a table.

    Equal blocks one behind the other (text with a short period) become one row.

    Args:
        texts: The batch.
        blocks: From :func:`find_blocks`.
        size: Bytes of a window.
        table: From :func:`puna.data.lines.kernels.fill_table`.
        used: Likewise.

    Returns:
        int64 [n, 6]: fingerprint, two words of the hash of the bytes, byte of the document where
        the block begins, windows, repetitions; and int64 [n_docs + 1], the rows of each document.
    """
    return _describe(texts.data, texts.offsets, *blocks, size, table, used)


@kernel
def _copy(data: Array, starts: Array, offsets: Array) -> Array:
    out = np.empty(offsets[-1], np.uint8)
    for k in range(len(starts)):
        n_bytes = offsets[k + 1] - offsets[k]
        out[offsets[k] : offsets[k + 1]] = data[starts[k] : starts[k] + n_bytes]
    return out


def copy_pieces(texts: Texts, starts: np.ndarray, n_bytes: np.ndarray) -> Texts:
    """Return pieces of the data of a batch, which may overlap, one behind the other.

    Args:
        texts: The batch.
        starts: int64 [n]; first byte of each piece.
        n_bytes: int64 [n].
    """
    offsets = np.concatenate([[0], np.cumsum(n_bytes)]).astype(np.int64)
    return Texts(_copy(texts.data, starts, offsets), offsets)
