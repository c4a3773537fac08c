"""From windows that stand elsewhere to the pieces that are cut out of a document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from puna.data.kernels.buffers import Array, Int, Texts, kernel
from puna.data.kernels.chars import code_point, is_unspaced
from puna.data.lines.kernels import without_pieces

PLACE_BITS = 30
PLACE = 1 << PLACE_BITS
"""A place in the corpus is the rank of a document times this, plus a byte of the document."""

BORDERS = ("character", "word", "line")

PASSAGE_TYPE = pa.struct([(name, pa.int64()) for name in ("first_place", "n_bytes", "start")])


@kernel
def _merge(
    docs: Array, starts: Array, n_windows: Array, firsts: Array, size: Int
) -> tuple[Array, Array]:
    spans, passages = np.empty((len(docs), 3), np.int64), np.empty((len(docs), 4), np.int64)
    n, m = 0, 0
    for r in range(len(docs)):
        end = starts[r] + n_windows[r] + size - 1
        if n and spans[n - 1, 0] == docs[r] and starts[r] <= spans[n - 1, 2]:
            spans[n - 1, 2] = max(spans[n - 1, 2], end)
        else:
            spans[n, 0], spans[n, 1], spans[n, 2] = docs[r], starts[r], end
            n += 1
        if m and passages[m - 1, 0] == docs[r]:
            ahead = starts[r] - passages[m - 1, 3]
            if (
                passages[m - 1, 2] == ahead + size - 1
                and firsts[r] == passages[m - 1, 1] + ahead
            ):  # fmt: skip
                passages[m - 1, 2] += n_windows[r]
                continue
        passages[m, 0], passages[m, 1] = docs[r], firsts[r]
        passages[m, 2], passages[m, 3] = n_windows[r] + size - 1, starts[r]
        m += 1
    return spans[:n], passages[:m]


@dataclass(frozen=True)
class SpanKernel:
    """Joins the windows of each document that stand elsewhere to spans and passages.

    Reads columns node, place (of the block), start, n_windows, repeats, begin, end, first_place;
    returns a row per document: ``spans`` (begin and end, in turn), ``passages`` (pieces that stand
    in one piece elsewhere), ``n_bytes_found``.

    Attributes:
        size: Bytes of a window.
        within: Windows count, too, that stand in the same document before them.
    """

    size: int
    within: bool

    def adds(self) -> pa.Schema:
        """Return the columns of a document."""
        return pa.schema(
            [
                pa.field("node", pa.int64()),
                pa.field("spans", pa.list_(pa.int64())),
                pa.field("passages", pa.list_(PASSAGE_TYPE)),
                pa.field("n_bytes_found", pa.int64()),
            ]
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the rows of some documents."""
        nodes, rows = np.unique(table["node"].to_numpy(), return_inverse=True)
        starts, n_windows, firsts, of_row = self._runs(table)
        docs = rows[of_row]
        order = np.lexsort((starts, docs))
        spans, passages = _merge(
            docs[order], starts[order], n_windows[order], firsts[order], self.size
        )
        is_found = np.isin(np.arange(len(nodes)), spans[:, 0])
        ends = np.arange(len(nodes) + 1)
        span_ends = 2 * np.searchsorted(spans[:, 0], ends)
        passage_ends = np.searchsorted(passages[:, 0], ends)
        found = np.bincount(spans[:, 0], spans[:, 2] - spans[:, 1], len(nodes)).astype(np.int64)
        values = [pa.array(np.ascontiguousarray(passages[:, k])) for k in (1, 2, 3)]
        items = pa.StructArray.from_arrays(values, fields=list(PASSAGE_TYPE))
        columns = [
            pa.array(nodes),
            pa.ListArray.from_arrays(pa.array(span_ends, pa.int32()),
                                     pa.array(spans[:, 1:].ravel())),
            pa.ListArray.from_arrays(pa.array(passage_ends, pa.int32()), items),
            pa.array(found),
        ]  # fmt: skip
        return pa.Table.from_arrays(columns, schema=self.adds()).filter(pa.array(is_found))

    def _runs(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Write out repetitions: start, windows, first place and row of each run to be cut."""
        names = ("start", "n_windows", "repeats", "begin", "end", "first_place", "place")
        start, stride, repeats, begin, end, first, place = (
            table[name].to_numpy() for name in names
        )
        skip = np.zeros(len(start), np.int64)
        if self.within:  # a repetition must not overlap with what it repeats
            skip = -((place + begin - first - self.size) // stride)
            skip = np.clip(skip, 0, repeats)
        is_whole = (begin == 0) & (end == stride)
        n_runs = np.where(is_whole, repeats > skip, repeats - skip)
        of_row = np.repeat(np.arange(len(start)), n_runs)
        number = np.arange(len(of_row)) - np.repeat(np.cumsum(n_runs) - n_runs, n_runs)
        starts = (start + begin)[of_row] + (skip[of_row] + number) * stride[of_row]
        whole = stride * (repeats - skip)
        return starts, np.where(is_whole, whole, end - begin)[of_row], first[of_row], of_row


@kernel
def _is_unspaced_at(data: Array, at: Int, low: Int, high: Int) -> bool:
    """Tell whether the code point before or behind a border is a word of its own."""
    if at < high and data[at] >= 0xE0 and is_unspaced(code_point(data, at, high)):
        return True
    before = at - 1
    while before > low and data[before] & 0xC0 == 0x80:
        before -= 1
    return before >= low and data[before] >= 0xE0 and is_unspaced(code_point(data, before, high))


@kernel
def _inner(data: Array, low: Int, high: Int, begin: Int, end: Int, border: Int) -> tuple[Int, Int]:
    """Move the ends of a span inwards to the next border; begin = end when nothing is left."""
    while begin < end and begin > low:
        if data[begin] & 0xC0 != 0x80 and (
            border == 0
            or (border == 1 and data[begin - 1] <= 32)
            or (border == 2 and data[begin - 1] == 10)
            or (border == 1 and _is_unspaced_at(data, begin, low, high))
        ):
            break
        begin += 1
    while end > begin and end < high:
        if data[end] & 0xC0 != 0x80 and (
            border == 0
            or (border == 1 and (data[end] <= 32 or data[end - 1] <= 32))
            or (border == 2 and data[end - 1] == 10)
            or (border == 1 and _is_unspaced_at(data, end, low, high))
        ):
            break
        end -= 1
    return begin, end


@kernel
def _pieces(
    data: Array, offsets: Array, spans: Array, bounds: Array, border: Int
) -> tuple[Array, Array, Array]:
    starts = np.empty(len(spans) + len(bounds) + 1, np.int64)
    cut = np.zeros(len(starts), np.bool_)
    doc_pieces = np.zeros(len(bounds), np.int64)
    n = 0
    for d in range(len(bounds) - 1):
        low, high = offsets[d], offsets[d + 1]
        starts[n] = low
        n += 1
        for k in range(bounds[d], bounds[d + 1], 2):
            begin, end = _inner(data, low, high, low + spans[k], low + spans[k + 1], border)
            if begin >= end:
                continue
            starts[n], cut[n] = begin, True
            starts[n + 1] = end
            n += 2
        doc_pieces[d + 1] = n
    starts[n] = offsets[-1]
    return starts[: n + 1], cut[:n], doc_pieces


def without_spans(
    texts: Texts, spans: np.ndarray, bounds: np.ndarray, border: str
) -> tuple[Texts, np.ndarray]:
    """Cut spans out of texts, at borders inside of them.

    Args:
        texts: The batch.
        spans: int64; begin and end of each span in turn, bytes of its text, ascending.
        bounds: int64 [n_docs + 1]; text ``d`` has ``spans[bounds[d]:bounds[d + 1]]``.
        border: One of :data:`BORDERS`: what is cut begins and ends with a whole character, word
            (white space and scripts without spaces separate words) or line.

    Returns:
        The texts that are left, and the number of spans cut from each (int32).
    """
    pieces = _pieces(texts.data, texts.offsets, spans, bounds, BORDERS.index(border))
    return without_pieces(texts, *pieces)
