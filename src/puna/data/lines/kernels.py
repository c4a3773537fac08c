"""Lines and paragraphs of a batch: their keys, how often they occur, texts without some of them.

A key is a 64-bit hash of a normalised line and of its bucket of documents. Two of *n* different
lines share a key with a probability of about n**2 / 2**65; a line that is cut by such an accident
would have to share its key with one of the few frequent ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from puna.data.kernels.buffers import (
    FNV_PRIME,
    FNV_SEED,
    MIX,
    Array,
    Int,
    Texts,
    find_slot,
    fixed,
    kernel,
    power_of_two,
)
from puna.data.kernels.normal_words import mixed

_LINE, _PARAGRAPH = np.uint64(0x6C696E65), np.uint64(0x70617261)


class LineTable(NamedTuple):
    """The lines of a batch.

    Line ``k`` is ``data[starts[k]:starts[k + 1]]`` (its newline included), document ``d`` has the
    lines ``doc_lines[d]`` to ``doc_lines[d + 1]``.

    Attributes:
        starts: int64 [n_lines + 1].
        keys: uint64 [n_lines]; 0 for lines that are blank or too short to be compared.
        paragraphs: int64 [n_lines]; paragraph of the line (blank lines belong to the one before),
            -1 for blank lines at the start of a document.
        doc_lines: int64 [n_docs + 1].
        paragraph_keys: uint64 [n_paragraphs]; 0 for those that are too short.
        doc_paragraphs: int64 [n_docs + 1].
    """

    starts: np.ndarray
    keys: np.ndarray
    paragraphs: np.ndarray
    doc_lines: np.ndarray
    paragraph_keys: np.ndarray
    doc_paragraphs: np.ndarray


def fold_table(case: bool, digits: bool) -> np.ndarray:
    """Return what each byte counts as: letters in lower case, every digit as 0 (uint8 [256])."""
    table = np.arange(256, dtype=np.uint8)
    if case:
        table[ord("A") : ord("Z") + 1] += 32
    if digits:
        table[ord("0") : ord("9") + 1] = ord("0")
    return fixed(table)


@kernel
def _n_lines(data: Array, offsets: Array) -> Int:
    n = len(offsets) - 1
    for i in range(offsets[0], offsets[-1]):
        n += data[i] == 10
    return n


@kernel
def _space_bytes(data: Array, i: Int, end: Int) -> Int:
    """Return the bytes of the white space that begins at ``i``; 0 when there is none.

    ASCII, no-break space, U+2000 to U+200B and the ideographic space.
    """
    byte = data[i]
    if byte <= 32:
        return 1
    if byte < 0xC2 or byte > 0xE3:
        return 0
    if byte == 0xC2:
        return 2 if i + 1 < end and data[i + 1] == 0xA0 else 0
    if i + 2 >= end or data[i + 1] != 0x80:
        return 0
    if byte == 0xE2:
        return 3 if data[i + 2] <= 0x8B else 0
    return 3 if byte == 0xE3 and data[i + 2] == 0x80 else 0


@kernel
def _hash_line(data: Array, start: Int, end: Int, fold: Array, squeeze: bool) -> tuple[Int, Int]:
    """Hash a line; return the hash and the bytes that count (0 for a blank line)."""
    value, n, gap, n_blank, i = FNV_SEED, 0, False, 0, start
    while end > start and data[end - 1] <= 32:
        end -= 1
    while i < end:
        byte = data[i]
        if 32 < byte < 0xC2:  # the usual case first: one byte that is no white space
            n_space = 0
        else:
            n_space = _space_bytes(data, i, end)
            if n_space and squeeze:
                gap = n > 0
                i += n_space
                continue
        if gap:
            value = (value ^ np.uint64(32)) * FNV_PRIME
            n, gap = n + 1, False
        if n_space:
            n_blank += 1
            for _ in range(1, n_space):
                value = (value ^ np.uint64(data[i])) * FNV_PRIME
                n, n_blank, i = n + 1, n_blank + 1, i + 1
        value = (value ^ np.uint64(fold[data[i]])) * FNV_PRIME
        n, i = n + 1, i + 1
    return mixed(value), n if n > n_blank else 0


@kernel
def _scan(
    data: Array, offsets: Array, buckets: Array, alive: Array, fold: Array, squeeze: bool,
    min_bytes: Int,
) -> tuple[Array, Array, Array, Array, Array, Array]:  # fmt: skip
    n_docs = len(offsets) - 1
    most = _n_lines(data, offsets)
    starts = np.empty(most + 1, np.int64)
    keys, paragraph_keys = np.zeros(most, np.uint64), np.zeros(most, np.uint64)
    paragraphs = np.empty(most, np.int64)
    doc_lines, doc_paragraphs = np.zeros(n_docs + 1, np.int64), np.zeros(n_docs + 1, np.int64)
    n, n_par = 0, 0
    starts[0] = offsets[0]
    for d in range(n_docs):
        i, end = offsets[d], offsets[d + 1]
        salt = mixed(np.uint64(buckets[d]) * MIX + _LINE)
        block_salt = mixed(np.uint64(buckets[d]) * MIX + _PARAGRAPH)
        block, block_bytes, open_block, first_par = FNV_SEED, 0, False, n_par
        while i < end and alive[d]:
            stop = i
            while stop < end and data[stop] != 10:
                stop += 1
            value, n_bytes = _hash_line(data, i, stop, fold, squeeze)
            if n_bytes and not open_block:
                block, block_bytes, open_block, n_par = FNV_SEED, 0, True, n_par + 1
            if n_bytes:
                block = mixed((block ^ value) * FNV_PRIME)
                block_bytes += n_bytes
                paragraph_keys[n_par - 1] = 0
                if block_bytes >= min_bytes:
                    paragraph_keys[n_par - 1] = max(mixed(block ^ block_salt), np.uint64(1))
                if n_bytes >= min_bytes:
                    keys[n] = max(mixed(value ^ salt), np.uint64(1))
            else:
                open_block = False
            paragraphs[n] = n_par - 1 if n_par > first_par else -1
            i = min(stop + 1, end)
            n += 1
            starts[n] = i
        if not alive[d] and i < end:  # one line, which is compared with nothing
            paragraphs[n] = -1
            n += 1
            starts[n] = end
        doc_lines[d + 1], doc_paragraphs[d + 1] = n, n_par
    return starts[: n + 1], keys[:n], paragraphs[:n], doc_lines, paragraph_keys[:n_par], \
        doc_paragraphs  # fmt: skip


def scan_lines(
    texts: Texts,
    buckets: np.ndarray,
    alive: np.ndarray,
    fold: np.ndarray,
    *,
    squeeze: bool,
    min_bytes: int,
) -> LineTable:
    """Find and hash the lines and paragraphs of a batch.

    Args:
        texts: The batch.
        buckets: int64 per text; lines are compared inside a bucket.
        alive: bool per text; a text that is not alive is one line without a key.
        fold: From :func:`fold_table`.
        squeeze: Compare runs of white space as one space and ignore it at the start.
        min_bytes: Normalised lines and paragraphs with fewer bytes have no key.
    """
    return LineTable(
        *_scan(texts.data, texts.offsets, buckets, alive, fold, squeeze, max(min_bytes, 1))
    )


@kernel
def _count(keys: Array, doc_units: Array) -> tuple[Array, Array, Array]:
    size = power_of_two(2 * len(keys) + 2)
    table, used = np.empty(size, np.uint64), np.zeros(size, np.int64)
    found, counts = np.empty(len(keys), np.uint64), np.zeros(len(keys), np.int64)
    ends = np.zeros(len(doc_units), np.int32)
    n = 0
    for d in range(len(doc_units) - 1):
        for k in range(doc_units[d], doc_units[d + 1]):
            if keys[k] == 0:
                continue
            slot = find_slot(table, used, size - 1, keys[k])
            if used[slot] == 0:
                table[slot], found[n] = keys[k], keys[k]
                n += 1
                used[slot] = n
            counts[used[slot] - 1] += 1
        ends[d + 1] = n
    return found[:n], counts[:n], ends


def count_keys(
    keys: np.ndarray, doc_units: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the keys of a batch; each stands with the document in which it comes first.

    Args:
        keys: uint64 [n]; 0 is not counted.
        doc_units: int64 [n_docs + 1]; the keys of document ``d`` are ``doc_units[d]`` to
            ``doc_units[d + 1]``.

    Returns:
        Different keys (uint64), their counts (int64), and int32 [n_docs + 1] with the bounds of the
        keys that come first in a document.
    """
    return _count(keys, doc_units)


@kernel
def _fill(table: Array, used: Array, keys: Array, firsts: Array) -> None:
    for i in range(len(keys)):
        slot = find_slot(table, used, len(table) - 1, np.uint64(keys[i]))
        table[slot], used[slot] = np.uint64(keys[i]), firsts[i] + 1


def fill_table(table: np.ndarray, used: np.ndarray, keys: np.ndarray, firsts: np.ndarray) -> None:
    """Insert keys and the number of the document in which each comes first.

    Args:
        table: uint64, a power of two larger than the number of all keys; gets the keys.
        used: int64 of the same length, zeros at first; gets the document's number + 1.
        keys: int64, the bits of the keys.
        firsts: int64.
    """
    _fill(table, used, keys, firsts)


@kernel
def _mark(
    keys: Array, doc_units: Array, table: Array, used: Array, first_node: Int, keep_first: bool
) -> Array:
    cut = np.zeros(len(keys), np.bool_)
    mask = len(table) - 1
    size = power_of_two(2 * len(keys) + 2) if keep_first else 8
    kept, seen = np.empty(size, np.uint64), np.zeros(size, np.int8)
    for d in range(len(doc_units) - 1):
        for k in range(doc_units[d], doc_units[d + 1]):
            if keys[k] == 0:
                continue
            slot = find_slot(table, used, mask, keys[k])
            if used[slot] == 0:
                continue
            cut[k] = True
            if keep_first and used[slot] - 1 == first_node + d:
                mine = find_slot(kept, seen, size - 1, keys[k])
                if not seen[mine]:
                    kept[mine], seen[mine], cut[k] = keys[k], 1, False
    return cut


def mark_frequent(
    keys: np.ndarray,
    doc_units: np.ndarray,
    table: np.ndarray,
    used: np.ndarray,
    first_node: int,
    keep_first: bool,
) -> np.ndarray:
    """Tell which lines are in the table: bool per key.

    Args:
        keys: uint64 per line; 0 is never marked.
        doc_units: Bounds of the documents.
        table: From :func:`fill_table`.
        used: Likewise.
        first_node: Number of the first document of the batch in the dataset.
        keep_first: Leave the first occurrence of each key unmarked.
    """
    return _mark(keys, doc_units, table, used, first_node, keep_first)


@kernel
def _cut(
    data: Array, starts: Array, doc_lines: Array, cut: Array
) -> tuple[Array, Array, Array]:  # fmt: skip
    n_docs = len(doc_lines) - 1
    total = 0
    for k in range(len(cut)):
        if not cut[k]:
            total += starts[k + 1] - starts[k]
    out, offsets = np.empty(total, np.uint8), np.zeros(n_docs + 1, np.int64)
    n_cut = np.zeros(n_docs, np.int32)
    size = 0
    for d in range(n_docs):
        for k in range(doc_lines[d], doc_lines[d + 1]):
            if cut[k]:
                n_cut[d] += 1
                continue
            n_bytes = starts[k + 1] - starts[k]
            out[size : size + n_bytes] = data[starts[k] : starts[k + 1]]
            size += n_bytes
        offsets[d + 1] = size
    return out, offsets, n_cut


def without_pieces(
    texts: Texts, starts: np.ndarray, cut: np.ndarray, doc_pieces: np.ndarray
) -> tuple[Texts, np.ndarray]:
    """Return the texts without some of their pieces, and the number cut from each (int32).

    Args:
        texts: The batch.
        starts: int64 [n + 1]; piece ``k`` is ``data[starts[k]:starts[k + 1]]``.
        cut: bool [n]; the pieces to leave out.
        doc_pieces: int64 [n_docs + 1]; document ``d`` is the pieces ``doc_pieces[d]`` to
            ``doc_pieces[d + 1]``.
    """
    out, offsets, n_cut = _cut(texts.data, starts, doc_pieces, cut)
    return Texts(fixed(out), fixed(offsets)), n_cut


def without_lines(texts: Texts, lines: LineTable, cut: np.ndarray) -> tuple[Texts, np.ndarray]:
    """Return the texts without the marked lines, and the number of lines cut from each (int32)."""
    return without_pieces(texts, lines.starts, cut, lines.doc_lines)


@kernel
def _long_lines(data: Array, starts: Array, min_bytes: Int) -> Array:
    """Number the lines with at least so many bytes."""
    found = np.empty(len(starts), np.int64)
    n = 0
    for k in range(len(starts) - 1):
        if starts[k + 1] - starts[k] >= min_bytes:
            found[n] = k
            n += 1
    return found[:n]


def long_lines(texts: Texts, lines: LineTable, min_bytes: int) -> tuple[np.ndarray, Texts]:
    """Return the numbers of lines with at least ``min_bytes``, and a view of them as texts.

    In the view, text ``2 * i + 1`` is the i-th of these lines; the others are what lies between.
    """
    numbers = _long_lines(texts.data, lines.starts, min_bytes)
    offsets = np.empty(2 * len(numbers) + 2, np.int64)
    offsets[0], offsets[-1] = lines.starts[0], lines.starts[-1]
    offsets[1:-1:2], offsets[2:-1:2] = lines.starts[numbers], lines.starts[numbers + 1]
    return numbers, Texts(texts.data, fixed(offsets))
