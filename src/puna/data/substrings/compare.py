"""Blocks with one fingerprint are compared window by window, byte for byte.

Each window of a group goes into a hash table once, so that a group costs its windows, however many
of its members have something in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from puna.data.kernels.buffers import Array, Int, fixed, kernel, power_of_two
from puna.data.kernels.normal_words import mixed

KEY_FIELDS = [pa.field(name, pa.int64()) for name in ("key", "hash_1", "hash_2")]
"""What identifies the bytes of a block: fingerprint and two words of a hash."""

RUN_FIELDS = [pa.field(name, pa.int64()) for name in ("begin", "end", "first_place")]
"""Windows of a block that stand first, one behind the other, from this place on."""

_FACTOR = np.uint64(0x9FB21C651E98DF25)


@kernel
def _is_equal(data: Array, one: Int, two: Int, size: Int) -> bool:
    for k in range(size):  # noqa: SIM110 (numba has no all() over a generator)
        if data[one + k] != data[two + k]:
            return False
    return True


@kernel
def _run(
    data: Array, offsets: Array, row: Int, place: Int, size: Int, away: Int, keys: Array,
    spots: Array, firsts: Array, mask: Int, out: Array, n: Int,
) -> Int:  # fmt: skip
    """Look up the windows of a block, or insert them; write its runs; return the rows written.

    ``spots`` has the byte + 1 of ``data`` where the window of a slot stands, 0 for a free slot.
    """
    start, n_windows = offsets[row], offsets[row + 1] - offsets[row] - size + 1
    value, last = np.uint64(0), np.int64(-2)
    for k in range(size - 1):
        value = value * _FACTOR + np.uint64(data[start + k])
    for j in range(n_windows):
        at = start + j
        value = value * _FACTOR + np.uint64(data[at + size - 1])
        if j:
            value -= np.uint64(data[at - 1]) * away
        key = mixed(value)
        slot = np.int64((key ^ (key >> np.uint64(29))) & np.uint64(mask))
        while spots[slot] > 0:
            if keys[slot] == key:
                other = spots[slot] - 1
                if other == last + 1:  # all but the last byte have been compared
                    is_same = data[other + size - 1] == data[at + size - 1]
                else:
                    is_same = _is_equal(data, other, at, size)
                if is_same:
                    break
            slot = (slot + 1) & mask
        last = spots[slot] - 1
        if spots[slot] == 0:
            keys[slot], spots[slot], firsts[slot] = key, at + 1, place + j
            last = -2
        first = firsts[slot]
        if j and first == out[n - 1, 3] + j - out[n - 1, 1]:
            out[n - 1, 2] = j + 1
        else:
            out[n, 0], out[n, 1], out[n, 2], out[n, 3] = row, j, j + 1, first
            n += 1
    return n


@kernel
def _compare(groups: Array, places: Array, data: Array, offsets: Array, size: Int) -> Array:
    away = np.uint64(1)
    for _ in range(size):
        away *= _FACTOR
    n_slots = 8
    keys, spots = np.empty(n_slots, np.uint64), np.zeros(n_slots, np.int64)
    firsts = np.empty(n_slots, np.int64)
    out, n, row = np.empty((1024, 4), np.int64), 0, 0
    while row < len(groups):
        stop, total = row, 0
        while stop < len(groups) and groups[stop] == groups[row]:
            total += offsets[stop + 1] - offsets[stop] - size + 1
            stop += 1
        needed = power_of_two(2 * total)
        if needed > n_slots:
            n_slots = needed
            keys, spots = np.empty(n_slots, np.uint64), np.empty(n_slots, np.int64)
            firsts = np.empty(n_slots, np.int64)
        spots[:needed] = 0
        for member in range(row, stop):
            most = n + offsets[member + 1] - offsets[member]
            if most > len(out):
                larger = np.empty((2 * most, 4), np.int64)
                larger[:n] = out[:n]
                out = larger
            n = _run(data, offsets, member, places[member], size, away, keys, spots, firsts,
                     needed - 1, out, n)  # fmt: skip
        row = stop
    return out[:n]


def first_places(
    groups: np.ndarray, places: np.ndarray, data: np.ndarray, offsets: np.ndarray, size: int
) -> np.ndarray:
    """Find where each window of blocks stands first in its group.

    Args:
        groups: int64 [n]; equal for the blocks of a group, which follow each other.
        places: int64 [n]; where each block begins in the corpus, ascending inside a group.
        data: uint8; the blocks' bytes, one behind the other.
        offsets: int64 [n + 1].
        size: Bytes of a window.

    Returns:
        int64 [n_runs, 4]: block, its first window, behind its last one, place of the first one.
    """
    return _compare(groups, places, fixed(data), fixed(offsets), size)


def large_binary(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes (uint8) and offsets (int64 [n + 1]) of a binary column of any size."""
    wide: Any = column.cast(pa.large_binary()).combine_chunks()
    array = pa.concat_arrays(wide.chunks) if isinstance(wide, pa.ChunkedArray) else wide
    _, offsets_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.zeros(0, np.uint8) if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    return data, offsets


@dataclass(frozen=True)
class CompareKernel:
    """Compares the blocks (columns key, hash_1, hash_2, place, bytes) of each fingerprint.

    Attributes:
        size: Bytes of a window.
    """

    size: int

    def adds(self) -> pa.Schema:
        """Return the columns of a run: its block, windows and place."""
        return pa.schema([*KEY_FIELDS, *RUN_FIELDS])

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the runs of some groups."""
        data, offsets = large_binary(table["bytes"])
        groups, places = table["key"].to_numpy(), table["place"].to_numpy()
        runs = first_places(groups, places, data, offsets, self.size)
        rows = pa.array(runs[:, 0])
        names = [field.name for field in KEY_FIELDS]
        keys = [pc.call_function("take", [table[name].combine_chunks(), rows]) for name in names]
        columns = [pa.array(np.ascontiguousarray(runs[:, k])) for k in (1, 2, 3)]
        return pa.Table.from_arrays([*keys, *columns], schema=self.adds())
